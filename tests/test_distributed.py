"""Two real processes over gloo, as torchrun starts them, against one: DDP and FSDP train the same, and their checkpoints
are one another's."""

import csv
import re
import signal

import pytest
import torch
from fork_server import finish
from safetensors.torch import load_file

from simmim.training.saving import saved_steps, usable_checkpoint

STEPS = 50
NUMBERS = ("validation_loss", "loss", "lr", "grad_norm")
RUN = (
    "--preset=nano",
    "--data.validation=20",
    "--validate_every_epochs=1.45",
    "--epochs=7.2727",  # 50 steps
    "--batch-size=32",
    "--optim.lr=2e-3",  # at higher rates rounding, which differs with the number of processes, grows over 50 steps
    "--seed=3",
    "--save_every_steps=10",
    "--log_every_steps=1",
    "--model.mask_unit=8",
    "--model.encoder.embed_dim=16",
    "--model.encoder.depths=[1,2]",
    "--model.encoder.num_heads=[1,2]",
    "--reconstruct_every_epochs=2",
    "--precision=32-true",
    "--workers=0",
    "--trainer.accelerator=cpu",
)


@pytest.fixture(scope="module")
def start(fork_server, digits):
    """start(out, strategy or None for one process, *more words): its processes; resumed where the folder is there."""

    def start(out, strategy, *more, resume=False, prelude=""):
        words = ["pretrain", "--data", digits.unlabeled, "--out", out, *RUN, *more, *(["--resume"] if resume else [])]
        if strategy is None:
            return [fork_server.start(*words, "--devices=1", "--trainer.strategy=auto")]
        return fork_server.start_pair(*words, "--devices=2", f"--trainer.strategy={strategy}", prelude=prelude)

    return start


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """The run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    finish(start(run, None))
    return run


def losses(run):
    with (run / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    return torch.tensor([[float(row[name] or "nan") for name in NUMBERS] for row in table])


def assert_same(run, alone):
    """Losses, also on held-out images, and rates within 1e-5; gradient
    norms, which feel the rounding of 50 steps first, within 1e-2; weights
    and the exported encoder within 1e-4; the optimizer's second moments, tensor by tensor, within 1e-2 of their size."""
    ours, theirs = losses(run), losses(alone)
    torch.testing.assert_close(ours[:, :3], theirs[:, :3], rtol=1e-5, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(ours[:, 3], theirs[:, 3], rtol=1e-2, atol=0)
    assert len(ours[:, 0][ours[:, 0] > 0]) == 5, "measured every ten steps"
    assert len(ours) == STEPS
    ours, theirs = (torch.load(usable_checkpoint(path), weights_only=True) for path in (run, alone))
    assert ours["global_step"] == theirs["global_step"] == STEPS
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=1e-4)
    moments = [
        {key: value["exp_avg_sq"] for key, value in end["optimizer_states"][0]["state"].items()} for end in (ours, theirs)
    ]
    assert moments[0].keys() == moments[1].keys()
    for key, moment in moments[0].items():
        assert (moment - moments[1][key]).norm() <= 1e-2 * moments[1][key].norm() + 1e-12, key
    pair = (load_file(path / "encoder" / "encoder.safetensors") for path in (run, alone))
    torch.testing.assert_close(*pair, rtol=0, atol=1e-4)


@pytest.mark.two_processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(start, alone, tmp_path, strategy):
    """The same global batch: losses within 1e-5 relative over 50 steps, weights within 1e-4, and one plain encoder."""
    output = finish(start(tmp_path / "run", strategy))
    assert "on 2 × cpu" in output
    assert_same(tmp_path / "run", alone)


@pytest.mark.two_processes
@pytest.mark.parametrize("first, second", [("ddp", "fsdp"), ("fsdp", None), (None, "ddp")])  # each writes and each reads
def test_checkpoints_move_between_strategies_and_world_sizes(start, alone, tmp_path, first, second):
    """Stopped by a signal to one process, which all obey; taken up by other processes in another way."""
    run = tmp_path / "run"
    processes = start(run, first)
    processes[0].until(lambda: max(saved_steps(run), default=0) >= 10)
    processes[-1].kill(signal.SIGTERM, group=False)
    finish(processes, code=143)
    assert 10 <= max(saved_steps(run)) < STEPS
    output = finish(start(run, second, resume=True))
    assert "resuming from" in output
    assert_same(run, alone)


@pytest.mark.two_processes
def test_sharded_parameters_are_divided(start, tmp_path):
    """Each of the two processes holds about half of the parameters and of the optimizer's state."""
    counted = """
import simmim.pretrain.run, simmim.training.progress as progress
end = progress.Throughput.on_train_batch_end
def count(self, trainer, module, *rest):
    end(self, trainer, module, *rest)
    if trainer.global_step == 2:
        local = sum(p.to_local().numel() for p in module.parameters())
        state = sum(v.to_local().numel() for s in trainer.optimizers[0].state.values() for v in s.values() if v.ndim)
        whole = sum(p.numel() for p in module.parameters())
        print(f"shares {local / whole:.3f} {state / whole:.3f}", flush=True)
progress.Throughput.on_train_batch_end = count
"""
    output = finish(start(tmp_path / "run", "fsdp", "--epochs=0.5", prelude=counted))
    local, state = re.search(r"shares (\d\S*) (\d\S*)", output).groups()
    assert abs(float(local) - 0.5) < 0.05 and abs(float(state) - 1.0) < 0.1


@pytest.mark.two_processes
def test_products_are_gathered_in_half_precision(start, tmp_path):
    """Where autocast would cast them; all else in float32. Losses, weights and the optimizer's state, which are float32, are
    those of gathering in float32."""
    count = """
import os
os.environ["SIMMIM_KERNELS"] = "0"
import simmim.training.module as training
shard = training.shard
names = {"attn.qkv": ["weight"], "attn.proj": ["weight", "bias"], "mlp": ["fc1.weight"], "norm1": ["weight"],
         "attn": ["logit_scale"], "attn.cpb_mlp": ["0.weight"]}
seen = set()
def see(name, part):
    before = len(seen)
    seen.update(f"{name}.{leaf} {str(part.get_parameter(leaf).dtype)[6:]}" for leaf in names[name])
    if len(seen) > before and len(seen) == 7:
        print("gathered", *sorted(seen), sep="; ", flush=True)
def shard_and_listen(module, model):
    shard(module, model)
    for name in names:
        part = model.encoder.blocks()[0].get_submodule(name)
        part.register_forward_pre_hook(lambda part, given, name=name: see(name, part))
training.shard = shard_and_listen
"""
    words = ("--precision=bf16-mixed", "--epochs=1.5", "--model.encoder.drop_path_rate=0.1")
    output = finish(start(tmp_path / "half", "fsdp", *words, prelude=count))
    (line,) = {line for line in output.splitlines() if line.startswith("gathered")}
    half = ["attn.proj.bias", "attn.proj.weight", "attn.qkv.weight", "mlp.fc1.weight"]
    full = ["attn.cpb_mlp.0.weight", "attn.logit_scale", "norm1.weight"]
    found = dict(part.split() for part in line.split("; ")[1:])
    assert found == dict.fromkeys(half, "bfloat16") | dict.fromkeys(full, "float32")
    without = """
import os
os.environ["SIMMIM_KERNELS"] = "0"
import simmim.training.sharding as sharding
sharding.HALF_PRECISIONS = {}
"""
    finish(start(tmp_path / "full", "fsdp", *words, prelude=without))
    ours, theirs = losses(tmp_path / "half"), losses(tmp_path / "full")
    assert len(ours) == len(theirs) > 8
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    ends = [torch.load(usable_checkpoint(tmp_path / run), weights_only=True) for run in ("half", "full")]
    assert all(value.dtype == torch.float32 for value in ends[0]["state_dict"].values() if value.is_floating_point())
    torch.testing.assert_close(ends[0]["state_dict"], ends[1]["state_dict"], rtol=0, atol=0)


def test_a_batch_that_does_not_divide_is_refused(start, tmp_path):
    for process in start(tmp_path / "run", "ddp", "--batch-size=33"):
        code, output = process.wait()
        assert code == 2 and "a batch of 33 images does not divide into 2 devices" in output, output


# For each tensor of a list torch (2.13) searches all of the list for strided shards, which FSDP alone has none of. For the
# 900 parameters of a giant this takes most of the first step.
NO_STRIDED_SHARDS = """
import torch.distributed.tensor._sharding_prop as propagation
propagation._propagate_use_strided_shard_flag = lambda *given: None
"""


@pytest.mark.two_processes
def test_a_giant_of_reduced_width_trains_sharded(start, tmp_path):
    """All 50 blocks of giant-3b with their extra norms, under FSDP, activation checkpoints and sequential attention."""
    words = (
        "--preset=giant-3b",
        "--data.validation=4",
        "--image-size=64",
        "--epochs=0.02",
        "--batch-size=4",
        "--model.mask_unit=32",
        "--model.encoder.embed_dim=16",
        "--model.encoder.depths=[2,2,42,4]",
        "--model.encoder.num_heads=[1,2,4,8]",
        "--model.checkpoint_activations=true",
        "--model.sequential_attention=2",
    )
    output = finish(start(tmp_path / "run", "fsdp", *words, prelude=NO_STRIDED_SHARDS))
    assert "1 step of 4 images" in output
    state = load_file(tmp_path / "run" / "encoder" / "encoder.safetensors")
    assert sum(name.endswith("norm3.weight") for name in state) == 7
