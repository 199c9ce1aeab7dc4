"""Callbacks that watch a run: the random numbers of each step."""

from types import SimpleNamespace

import torch

from simmim.training.progress import StepSeeds


def drawn(seeds, step, rank=0):
    """What torch draws in the next batch."""
    seeds.on_train_batch_start(SimpleNamespace(global_step=step, global_rank=rank))
    return torch.rand(()).item()


def test_every_step_part_and_process_draws_its_own_numbers():
    """Stochastic depth differs between steps, between batches accumulated in one step, and between processes; a run that is
    taken up at a step draws what the uninterrupted one drew there."""
    whole = StepSeeds(seed=3)
    numbers = {(step, part): drawn(whole, step) for step in range(4) for part in range(3)}
    assert len(set(numbers.values())) == len(numbers)
    resumed = StepSeeds(seed=3)
    assert [drawn(resumed, 2) for _ in range(3)] == [numbers[2, part] for part in range(3)]
    assert drawn(StepSeeds(seed=3), 0, rank=1) not in numbers.values()
    assert drawn(StepSeeds(seed=4), 0) not in numbers.values()
