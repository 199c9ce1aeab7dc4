"""Growing images on canvases with late mask tokens, by two real processes over gloo: the same groups and result as one
process, and resumed bit for bit."""

import pytest
import torch
from fork_server import finish
from safetensors.torch import load_file
from short_runs import equal

from simmim.training.saving import saved_steps, usable_checkpoint

# Ten steps. Images grow after the fifth; units of 4 px are smaller than the last stride, 8 px.
WORDS = (
    "--method=canvas",
    "--model.share=3",
    "--model.mask_unit=4",
    "--image_sizes=[16,32]",
    "--preset=nano",
    "--batch-size=24",
    "--epochs=1",
    "--seed=3",
    "--workers=0",
    "--precision=32-true",
    "--save_every_steps=2",
    "--log_every_steps=1",
    "--trainer.accelerator=cpu",
    "--model.encoder.embed_dim=16",
    "--model.encoder.depths=[1,2]",
    "--model.encoder.num_heads=[1,2]",
)
# Prints of each step the images of each canvas, in their order, and which of its patches are whose.
SHOW_CANVASES = """
import zlib
from simmim.pretrain.module import PretrainingModule
step = PretrainingModule.training_step
def show(self, batch, number):
    loss, size, seeds = step(self, batch, number), tuple(batch["image"].shape[-2:]), batch["seed"]
    mask = self.model.draw(size, seeds, batch["image"].device)
    for first in range(0, len(seeds), 3):
        of_canvas = zlib.crc32(mask[first : first + 3].numpy().tobytes())
        print("\\ncanvas", self.global_step, seeds[first : first + 3], size[0], of_canvas, sep="|", flush=True)
    return loss
PretrainingModule.training_step = show
"""


@pytest.fixture(scope="module")
def start(fork_server, digits):
    """start(out, strategy or None for one process, resume, prelude): its processes."""

    def start(out, strategy, resume=False, prelude=SHOW_CANVASES):
        words = ["pretrain", "--data", digits.unlabeled, *WORDS, "--out", out, *(["--resume"] if resume else [])]
        if strategy is None:
            return [fork_server.start(*words, "--devices=1", prelude=prelude)]
        return fork_server.start_pair(*words, "--devices=2", f"--trainer.strategy={strategy}", prelude=prelude)

    return start


def canvases_of(processes):
    """Step, seeds of the images, their size and their masks of every canvas of a run, whoever computed it."""
    finish(processes)
    lines = [line for process in processes for line in process.wait()[1].splitlines() if line.startswith("canvas|")]
    return sorted(tuple(line.split("|")[1:]) for line in lines)


def end_of(run):
    """Weights, optimizer and rates after the last step."""
    saved = torch.load(usable_checkpoint(run), weights_only=True)
    optimizer = saved["optimizer_states"][0]
    assert saved["global_step"] == 10
    rates = [group["lr"] for group in optimizer["param_groups"]]
    return {"weights": dict(saved["state_dict"]), "moments": optimizer["state"], "rates": rates}


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """The run of one process, and its canvases."""
    run = tmp_path_factory.mktemp("alone") / "run"
    return run, canvases_of(start(run, None))


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def pair(request, start, tmp_path_factory):
    """The uninterrupted run of two processes, its canvases, and its strategy."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    return run, canvases_of(start(run, request.param)), request.param


@pytest.mark.two_processes
def test_the_same_groups_and_the_same_encoder(alone, pair):
    """Eight canvases a step, small ones in the first five; weights but for the order of sums."""
    assert pair[1] == alone[1] and len(alone[1]) == 10 * 8
    assert [size for step, _, size, _ in alone[1][::8]] == ["16"] * 5 + ["32"] * 5
    ours, theirs = (load_file(run / "encoder" / "encoder.safetensors") for run in (pair[0], alone[0]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.two_processes
def test_resumed_equals_uninterrupted(start, pair, tmp_path):
    """Bit for bit, right at the change of size (DDP) and after it (FSDP); a signal to one process stops both."""
    step = {"ddp": 5, "fsdp": 7}[pair[2]]
    stop = (
        SHOW_CANVASES
        + f"""
import os, signal
shown = PretrainingModule.training_step
def stop(self, batch, number):
    if self.global_step == {step - 1} and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return shown(self, batch, number)
PretrainingModule.training_step = stop
"""
    )
    run = tmp_path / "run"
    finish(start(run, pair[2], prelude=stop), code=143)
    assert max(saved_steps(run)) == step, "it goes on from there"
    rest = canvases_of(start(run, pair[2], resume=True))
    assert rest == [canvas for canvas in pair[1] if int(canvas[0]) >= step]
    assert equal(end_of(run), end_of(pair[0]))
