"""torch.compile of the encoder's blocks: the same results, and a line and plain blocks where it does not work."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from fork_server import finish
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from toy_encoder import ToyConfig, ToyEncoder

from simmim.encoders.layers import DropPath
from simmim.encoders.registry import build
from simmim.encoders.swin import SwinConfig
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.encoders.vit import ViTConfig
from simmim.pretrain import DataSettings, PretrainSettings, SimMIMSettings
from simmim.pretrain.run import pretrain
from simmim.training import compiling

CONFIG = torch._dynamo.config
IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _reset_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def random_encoder(blocks=5):
    """One stage; every second block is shifted."""
    torch.manual_seed(0)
    encoder = SwinV2(SwinV2Config(16, (blocks,), (2,), window_size=4))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    return encoder


def gradients(encoder, images=IMAGES):
    """The features, and by name all gradients of a loss of which every feature is a part."""
    encoder.zero_grad()
    features = encoder(images).features
    (features * torch.linspace(-1, 1, features.numel()).sin().view_as(features)).sum().backward()
    return {"features": features.detach(), **{name: value.grad.clone() for name, value in encoder.named_parameters()}}


def global_state():
    """What compiling may change for the whole process."""
    return CONFIG.recompile_limit, CONFIG.suppress_errors, list(warnings.filters)


def test_the_default_compiler_computes_the_same(reference_implementation, monkeypatch):
    """One block, a shifted one, which does all that one in place does: C++ takes the compiler twenty seconds a block."""
    # Else each of the processor's instruction sets is tried by compiling a file of its own, which takes seconds each.
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", True)
    encoder, reports = random_encoder(2), []
    expected = gradients(encoder)
    undo = compiling.compile_blocks(encoder, reports.append)
    encoder.layers[0].blocks[0]._compiled_call_impl = None
    actual = gradients(encoder)
    undo.close()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"] and not reports
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-3, atol=1e-3 * value.abs().max()), name


def test_compiled_blocks_compute_the_same(reference_implementation):
    """By one compilation for like blocks, under the same names of weights; afterwards all is as it was."""
    encoder = random_encoder()
    expected, names, state = gradients(encoder), list(encoder.state_dict()), global_state()
    reports = []
    undo = compiling.compile_blocks(encoder, reports.append, backend="aot_eager")
    actual = gradients(encoder)
    assert counters["stats"]["unique_graphs"] == 2, "one for shifted windows and one for those in place"
    assert not counters["graph_break"] and not reports
    assert list(encoder.state_dict()) == names
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-3, atol=1e-3 * value.abs().max()), name
    assert CONFIG.recompile_limit >= 4 * 5
    undo.close()
    assert global_state() == state
    counters.clear()
    assert all(map(torch.equal, gradients(encoder).values(), expected.values())) and not counters["stats"]


def test_copies_of_compiled_blocks_are_not_compiled(reference_implementation):
    encoder = random_encoder(2)
    undo = compiling.compile_blocks(encoder, print, backend="eager")
    for copied in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert all(block._compiled_call_impl is None for block in copied.blocks())
        assert torch.allclose(copied(IMAGES).features, encoder(IMAGES).features, atol=1e-6)
    undo.close()


def compiled_steps(encoder, images, backend, num_steps=3):
    """The graphs, and how many there were after each training step."""
    counter, reports, counts = CompileCounterWithBackend(backend), [], []
    undo = compiling.compile_blocks(encoder.train(), reports.append, counter)
    for _ in range(num_steps):
        encoder(images).features.square().mean().backward()
        counts.append(counter.frame_count)
    undo.close()
    assert not reports and not counters["graph_break"]
    return counter.graphs, counts


@pytest.mark.parametrize(
    ("config", "num_graphs"),
    [
        # Windows in place and shifted at three resolutions, the last of which one window covers.
        (SwinV2Config(16, (2, 6, 2), (2, 2, 2), window_size=4, drop_path_rate=0.2), 5),
        (SwinConfig(16, (2, 6, 2), (2, 2, 2), window_size=4, drop_path_rate=0.2), 5),
        # The second map, 4 × 6 tokens, has moved tables.
        (SwinConfig(16, (1, 3), (2, 2), window_size=7, drop_path_rate=0.2), 2),
        # The first block has no stochastic depth.
        (ViTConfig(16, 5, 2, image_size=(48, 32), patch_size=8, position_bias="blocks", drop_path_rate=0.2), 2),
    ],
)
def test_blocks_of_equal_shapes_are_one_graph(config, num_graphs, reference_implementation):
    """Whatever their rates of stochastic depth. Later steps compile nothing, and no graph computes what sizes determine."""
    torch.manual_seed(0)
    # Of few graphs the backward pass is compiled too, which takes most of the time.
    images, backend = (torch.randn(2, 3, 64, 64), "eager") if num_graphs == 5 else (IMAGES, "aot_eager")
    graphs, counts = compiled_steps(build(config), images, backend)
    assert counts == [num_graphs] * 3
    targets = {node.target for graph in graphs for node in graph.graph.nodes}
    assert torch.rand in targets and not targets & {torch.arange, torch.meshgrid, torch.log2, torch.ge, torch.linalg.solve}


def test_compiled_stochastic_depth_draws_as_it_should():
    """Whole images, each kept with its block's probability and scaled by its inverse; the same numbers by the same seed."""
    drops, counter = [DropPath(rate).train() for rate in (0.3, 0.6)], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda drop, x: drop(x), backend=counter, dynamic=False)
    for drop in drops:
        kept = 1 - drop.rate
        torch.manual_seed(0)
        out = compiled(drop, torch.ones(20000, 2, 3))
        assert torch.equal(out, out[:, :1, :1].expand_as(out))
        assert sorted(out.unique().tolist()) == pytest.approx([0, 1 / kept])
        assert out[:, 0, 0].mean().item() == pytest.approx(1, abs=0.045)  # 5 standard errors
        torch.manual_seed(0)
        assert torch.equal(compiled(drop, torch.ones(20000, 2, 3)), out)
    assert counter.frame_count == 1


def test_a_backward_pass_that_does_not_compile_runs_as_it_is():
    """One line, no error in the middle of a step, and the results of plain blocks."""
    encoder, reports = ToyEncoder(ToyConfig()), []
    expected, state = gradients(encoder), functorch_config.force_non_lazy_backward_lowering

    def fail(graph, inputs):
        raise RuntimeError("this graph is too hard\nand more in other lines")

    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=fail)
    undo = compiling.compile_blocks(encoder, reports.append, backend)
    for name, value in gradients(encoder).items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max()), name
    assert reports == ["this graph is too hard"]
    undo.close()
    assert functorch_config.force_non_lazy_backward_lowering == state


@pytest.mark.parametrize("failing", [1, 2, 100])
def test_blocks_that_do_not_compile_run_as_they_are(failing):
    """One report, whatever number of compilations fail; results are those of plain blocks."""
    encoder, failures, reports = ToyEncoder(ToyConfig()), [], []
    expected, state = gradients(encoder), global_state()

    def backend(graph, inputs):
        if len(failures) < failing:
            failures.append(1)
            raise RuntimeError("this graph is too hard\nand more in other lines")
        return graph.forward

    undo = compiling.compile_blocks(encoder, reports.append, backend)
    for name, value in gradients(encoder).items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max()), name
    assert reports == ["RuntimeError: this graph is too hard"] or reports == ["this graph is too hard"]
    num_attempts = len(failures)
    assert num_attempts == min(failing, 3)
    gradients(encoder)
    assert len(failures) == num_attempts and len(reports) == 1
    undo.close()
    assert global_state() == state


def test_errors_of_a_block_are_raised_as_they_are():
    class Broken(torch.nn.Module):
        def forward(self, x, windows_at_once=None, groups=None):
            raise ValueError("not by the compiler")

    encoder, reports = random_encoder(), []
    encoder.layers[0].blocks[0] = Broken()
    undo = compiling.compile_blocks(encoder, reports.append, backend="eager")
    with pytest.raises(ValueError, match="not by the compiler"):
        encoder(IMAGES)
    undo.close()


def test_another_encoder_compiles():
    encoder, reports = ToyEncoder(ToyConfig()), []
    expected = gradients(encoder)
    undo = compiling.compile_blocks(encoder, reports.append, backend="aot_eager")
    for name, value in gradients(encoder).items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-5), name
    assert not reports and counters["stats"]["unique_graphs"] == 3
    undo.close()


def test_without_a_compiler_there_is_a_reason(fork_server, tmp_path):
    program = """
import os, torch
from simmim.encoders.registry import build, preset_config
from simmim.training.compiling import why_not
os.environ.pop("CXX", None)
print("because", why_not(torch.device("cpu"), build(preset_config("nano"))))
"""
    environment = {"SIMMIM_KERNELS": "0", "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    said = finish([fork_server.start("--version", prelude=program, env=environment)])
    (line,) = [line for line in said.splitlines() if line.startswith("because")]
    assert "compiler" in line.lower()


def fake_trainer():
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), is_global_zero=True)


@pytest.mark.parametrize("end", ["teardown", "on_exception"])
def test_the_callback_undoes_what_it_did(end, reference_implementation, monkeypatch):
    monkeypatch.setattr(compiling, "why_not", lambda device, encoder: "")
    encoder, state = random_encoder(), global_state()
    callback, module = compiling.CompileBlocks(), SimpleNamespace(model=SimpleNamespace(encoder=encoder))
    callback.setup(fake_trainer(), module, "fit")
    assert all(block._compiled_call_impl is not None for block in encoder.blocks()) and global_state() != state
    getattr(callback, end)(fake_trainer(), module, "fit")
    assert all(block._compiled_call_impl is None for block in encoder.blocks()) and global_state() == state


def run_settings(digits, folder):
    """Of a run of five steps, of one stage with a block of each kind."""
    data, model = DataSettings(str(digits.unlabeled)), SimMIMSettings(encoder={"depths": [2], "num_heads": [3]})
    small = {"preset": "nano", "image_size": 32, "epochs": 0.5, "batch_size": 24, "workers": 0}
    return PretrainSettings(data=data, out=str(folder), model=model, compile=True, **small)


@pytest.mark.parametrize("problem", ["", "no compiler"])
def test_a_run_compiles_or_says_why_not(problem, digits, tmp_path, monkeypatch, capsys, reference_implementation):
    compiled = []
    original = compiling.compile_blocks

    def compile_eagerly(encoder, report, num_sizes):
        compiled.append(encoder)
        return original(encoder, report, backend="eager")

    monkeypatch.setattr(compiling, "why_not", lambda device, encoder: problem)
    monkeypatch.setattr(compiling, "compile_blocks", compile_eagerly)
    state = global_state()[:2]
    pretrain(run_settings(digits, tmp_path / "run"))
    assert len(compiled) == (0 if problem else 1) and all(isinstance(encoder, SwinV2) for encoder in compiled)
    lines = [line for line in capsys.readouterr().out.splitlines() if "not compiled" in line]
    assert lines == ([f"note     blocks are not compiled by torch: {problem}"] if problem else [])
    assert global_state()[:2] == state


def test_a_run_goes_on_where_a_block_does_not_compile(digits, tmp_path, monkeypatch, capsys, reference_implementation):
    """The run ends well and prints one line."""

    def fail(graph, inputs):
        raise RuntimeError("this graph is too hard")

    original = compiling.compile_blocks
    monkeypatch.setattr(compiling, "why_not", lambda device, encoder: "")
    monkeypatch.setattr(compiling, "compile_blocks", lambda encoder, report, num_sizes: original(encoder, report, fail))
    pretrain(run_settings(digits, tmp_path / "run"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "not compiled" in line]
    assert len(lines) == 1 and "this graph is too hard" in lines[0]


def test_a_cpu_with_kernels_needs_no_compiler():
    assert "faster on a CPU" in compiling.why_not(torch.device("cpu"), build(SwinV2Config(16, (1,), (2,))))


def test_a_quiet_run_reports_nothing(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "why_not", lambda device, encoder: "no compiler")
    module = SimpleNamespace(model=SimpleNamespace(encoder=None))
    for quiet in (False, True):
        compiling.CompileBlocks(quiet).setup(fake_trainer(), module, "fit")
    assert capsys.readouterr().out.count("no compiler") == 1
