"""torch.compile of the encoder's blocks: the same numbers, one compilation for like blocks, and no harm where it fails."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from simmim.encoders.registry import build
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.pretrain.run import pretrain
from simmim.pretrain.settings import PretrainSettings
from simmim.training import compiling


def gradients(encoder, images):
    """Of a loss of which every feature is a part, by name, and the features."""
    encoder.zero_grad()
    features = encoder(images).features
    (features * torch.linspace(-1, 1, features.numel()).sin().view_as(features)).sum().backward()
    return {"features": features.detach(), **{name: value.grad.clone() for name, value in encoder.named_parameters()}}


def test_the_same_numbers_by_one_compilation_for_like_blocks(plain_lines):
    torch.manual_seed(0)
    encoder = SwinV2(SwinV2Config(16, (5,), (2,), window_size=4))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    images = torch.randn(2, 3, 32, 48)
    expected, names = gradients(encoder, images), list(encoder.state_dict())
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(suppress_errors=False):  # which compile_blocks sets for the whole process
        compiling.compile_blocks(encoder)
        torch._dynamo.config.suppress_errors = False
        actual = gradients(encoder, images)
    assert counters["stats"]["unique_graphs"] == 2, "one for shifted windows and one for those in place"
    assert not counters["graph_break"]
    assert list(encoder.state_dict()) == names
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-3, atol=1e-3 * value.abs().max()), name
    torch._dynamo.reset()


def test_without_a_compiler_there_is_a_reason(tmp_path):
    program = (
        "import torch; from simmim.encoders.registry import build, preset_config\n"
        "from simmim.training.compiling import why_not\n"
        "print('because', why_not(torch.device('cpu'), build(preset_config('nano'))))"
    )
    environment = {
        **os.environ,
        "SIMMIM_KERNELS": "0",
        "PATH": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    environment.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("because")]
    assert "compiler" in line.lower()


@pytest.mark.parametrize("problem", ["", "no compiler"])
def test_a_run_compiles_or_says_why_not(problem, digits, tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(compiling, "why_not", lambda device, encoder: problem)
    monkeypatch.setattr(compiling, "compile_blocks", compiled.append)
    settings = PretrainSettings(
        str(digits.unlabeled), str(tmp_path / "run"), preset="nano", image_size=32, epochs=1, batch_size=24, compile=True
    )
    pretrain(settings)
    assert len(compiled) == (0 if problem else 1) and all(isinstance(encoder, SwinV2) for encoder in compiled)
    said = [line for line in capsys.readouterr().out.splitlines() if "not compiled" in line]
    assert said == ([f"note     blocks are not compiled by torch: {problem}"] if problem else [])


def test_a_cpu_with_kernels_needs_none():
    assert "faster on a CPU" in compiling.why_not(torch.device("cpu"), build(SwinV2Config(16, (1,), (2,))))


def test_a_quiet_run_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "why_not", lambda device, encoder: "no compiler")
    module = SimpleNamespace(model=SimpleNamespace(encoder=None))
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), is_global_zero=True)
    for quiet in (False, True):
        compiling.CompileBlocks(quiet).setup(trainer, module, "fit")
    assert capsys.readouterr().out.count("no compiler") == 1
