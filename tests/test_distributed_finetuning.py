"""Fine-tuning by two real processes against one: averaged weights, frozen stages, balanced order and export are the same."""
import pytest
import torch
from nursery import finish
from safetensors.torch import load_file

from simmim.checkpoint import Preprocessing, save_encoder
from simmim.swinv2 import SwinV2, SwinV2Config

RUN = (
    "--labels-per-class=4", "--steps=6", "--batch-size=20", "--validations=2", "--precision=32-true", "--workers=0",
    "--trainer.accelerator=cpu", "--optim.ema=0.8", "--optim.lr=0.05", "--train-stages=1", "--data.erasing=0.5",
    "--data.balance=sampling",
)  # fmt: skip


@pytest.fixture(scope="module")
def start(nursery, digits, tmp_path_factory):
    """start(out, strategy or None for one process): its processes."""
    torch.manual_seed(0)
    encoder = SwinV2(SwinV2Config(16, (1, 1), (1, 2), window_size=4, in_channels=1))
    folder = save_encoder(tmp_path_factory.mktemp("encoder"), encoder, Preprocessing((32, 32), (0.13,), (0.31,)), {})

    def start(out, strategy):
        words = ["finetune", "classification", "--init", folder, "--data", digits.labeled, "--out", out, *RUN]
        if strategy is None:
            return [nursery.start(*words, "--devices=1")]
        return nursery.start_pair(*words, "--devices=2", f"--trainer.strategy={strategy}")

    return start


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    finish(start(run, None))
    return run


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(start, alone, tmp_path, strategy):
    run = tmp_path / "run"
    finish(start(run, strategy))
    ours, theirs = (torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (run, alone))
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=1e-5)
    averages = [end["callbacks"]["AverageWeights"]["average"] for end in (ours, theirs)]
    torch.testing.assert_close(*averages, rtol=0, atol=1e-5)
    assert not any(name.startswith("encoder.layers.0") for name in averages[0]), "what is frozen is not averaged"
    for name in ("encoder.safetensors", "head.safetensors"):
        pair = [load_file(path / "encoder" / name) for path in (run, alone)]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-5)
    assert (run / "classes.csv").read_text() == (alone / "classes.csv").read_text()
