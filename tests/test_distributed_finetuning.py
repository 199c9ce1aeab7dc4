"""Fine-tuning by two processes equals one: averaged weights, frozen stages, balanced order and export."""

import pytest
import torch
from fork_server import finish
from safetensors.torch import load_file

RUN = (
    "--labels-per-class=4",
    "--steps=6",
    "--batch-size=20",
    "--validations=2",
    "--precision=32-true",
    "--workers=0",
    "--trainer.accelerator=cpu",
    "--optim.ema=0.8",
    "--optim.lr=0.05",
    "--train-stages=1",
    "--data.erasing=0.5",
    "--data.balance=sampling",
)


@pytest.fixture(scope="module")
def start(fork_server, digits, encoder_folder):
    """start(out, strategy, …): the processes of a run; one without a strategy, else two."""

    def start(out, strategy, *more):
        words = ["finetune", "classification", "--init", encoder_folder, "--data", digits.labeled, "--out", out, *RUN, *more]
        if strategy is None:
            return [fork_server.start(*words, "--devices=1")]
        return fork_server.start_pair(*words, "--devices=2", f"--trainer.strategy={strategy}")

    return start


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    finish(start(run, None))
    return run


@pytest.mark.two_processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(start, alone, tmp_path, strategy):
    run = tmp_path / "run"
    finish(start(run, strategy))
    ours, theirs = (torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (run, alone))
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=1e-5)
    averages = [end["callbacks"]["AverageWeights"]["average"] for end in (ours, theirs)]
    torch.testing.assert_close(*averages, rtol=0, atol=1e-5)
    assert not any(name.startswith("encoder.layers.0") for name in averages[0]), "frozen parameters are not averaged"
    for name in ("encoder.safetensors", "head.safetensors"):
        pair = [load_file(path / "encoder" / name) for path in (run, alone)]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-5)
    assert (run / "classes.csv").read_text() == (alone / "classes.csv").read_text()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_self_training_by_two_processes_equals_one(start, digits, tmp_path, strategy):
    """Teacher, running means and counts too, which are over all unlabeled images of a step."""
    more = (f"--unlabeled={digits.unlabeled}", "--self-training.ratio=2", "--self-training.start=0.2")
    for name, kind in (("alone", None), ("pair", strategy)):
        finish(start(tmp_path / name, kind, *more))
    ours, theirs = (torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("pair", "alone"))
    assert theirs["state_dict"]["labeler.num_batches"] == 5
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=1e-5)
    averages = [end["callbacks"]["AverageWeights"]["average"] for end in (ours, theirs)]
    torch.testing.assert_close(*averages, rtol=0, atol=1e-5)
    first, second = ((tmp_path / name / "pseudo-labels.csv").read_text() for name in ("pair", "alone"))
    assert first == second and first.count("\n") > 2
