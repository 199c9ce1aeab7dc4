"""Products by a matrix unit. Where there is none, C that does what the unit does takes its place."""

import platform
import subprocess
from pathlib import Path

import pytest
import torch

from simmim.c_library import find_compiler, processor_features
from simmim.encoders.swinv2.kernels import block, library
from simmim.encoders.swinv2.kernels.windows import Windows, window_indices

X86 = platform.machine() == "x86_64"
NAMES = ("output", "log_sums", "qkv", "q_bias", "v_bias", "scale", "table")
# Sides of the map and of the window, shift, heads, channels of a head.
CASES = [(24, 12, 6, 2, 32), (15, 5, 2, 3, 12), (14, 7, 0, 1, 40), (8, 4, 2, 4, 16), (3, 3, 0, 2, 64), (2, 2, 0, 1, 32)]


def compiled(folder, monkeypatch, name, *flags):
    """The kernels with these flags."""
    monkeypatch.setattr(library, "processor_flag", lambda: "-march=x86-64" if X86 else "-mcpu=native")
    usual = ["-O1" if flag == "-O3" else flag for flag in library.FLAGS]  # which compiles in half of the time
    monkeypatch.setattr(library, "FLAGS", (*usual, *flags))
    file = folder / f"{name}.so"
    assert library.compile_kernels(find_compiler(), Path(library.__file__).parent, file)
    monkeypatch.undo()
    return library.KernelLibrary(file)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Kernels whose tiles are arrays."""
    with pytest.MonkeyPatch.context() as patch:
        return compiled(tmp_path_factory.mktemp("kernels"), patch, "emulated", "-DEMULATED_TILES")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Kernels that compute with float32 alone."""
    with pytest.MonkeyPatch.context() as patch:
        return compiled(tmp_path_factory.mktemp("kernels"), patch, "plain")


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Kernels with tiles, which the system does not let them use."""
    with pytest.MonkeyPatch.context() as patch:
        return compiled(tmp_path_factory.mktemp("kernels"), patch, "refused", "-DEMULATED_TILES=0")


def attention(kernels, case, groups=None, images=2, threads=1):
    """Output and gradients of attention in bfloat16, by name."""
    side, window, shift, heads, head_dim = case
    size = (window, window)
    windows = window_indices((side, side), size, (shift, shift), (side, side), False, torch.device("cpu"))
    if groups is not None:
        windows = Windows(windows.token_of, groups, windows.offset_of)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    tokens, dim = images * side**2, heads * head_dim
    qkv, grad = random(tokens, 3 * dim).bfloat16(), random(tokens, dim).bfloat16()
    q_bias, v_bias, scale = random(dim), random(dim), random(heads, 1, 1).abs() + 5
    table = random((2 * window - 1) ** 2, heads)
    output, log_sums = torch.empty_like(grad), torch.empty(images * windows.token_of.numel() * heads)
    gradients = [torch.empty_like(value) for value in (qkv, q_bias, v_bias, scale, table)]
    call = block.attention_call(qkv, q_bias, v_bias, scale, table, windows, images)
    call.threads = threads
    kernels.call("attention_forward", call, block.address(output), block.address(log_sums))
    kernels.call("attention_backward", call, *map(block.address, (log_sums, grad, *gradients)))
    return dict(zip(NAMES, (output, log_sums, *gradients)))


def distance(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_attention_by_tiles(case, emulated, plain):
    """As without: bfloat16 rounds weights and gradients between the products, to half of 1/128 each."""
    actual, expected = attention(emulated, case), attention(plain, case)
    assert emulated.has_weight_gradient and not plain.has_weight_gradient
    for name in NAMES:
        # The gradient of a head's temperature is one number, a sum that nearly cancels.
        assert distance(actual[name], expected[name]) < (0.03 if name == "scale" else 6e-3), name
    again = attention(emulated, case, threads=3)
    assert all(torch.equal(again[name], actual[name]) for name in NAMES)


def test_a_system_that_refuses_tiles(refused, plain):
    """The ways of processors without a matrix unit, bit for bit."""
    assert not refused.has_weight_gradient
    for case in CASES:
        actual, expected = attention(refused, case), attention(plain, case)
        assert all(torch.equal(actual[name], expected[name]) for name in NAMES), case


def test_tiles_keep_groups_apart(emulated, plain):
    """The tokens of a window that belong to different images do not attend to each other, by tiles either."""
    groups = (4 * (torch.arange(2 * 64) % 3)).to(torch.uint8).view(8, 16)
    case = (8, 4, 0, 2, 32)
    actual, expected = attention(emulated, case, groups), attention(plain, case, groups)
    for name in NAMES:
        assert distance(actual[name], expected[name]) < (0.03 if name == "scale" else 6e-3), name
    assert distance(actual["output"], attention(emulated, case)["output"]) > 0.1


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 16, 16), (33, 48, 16), (700, 16, 112), (2500, 96, 32)])
def test_gradient_of_a_weight(rows, outputs, inputs, emulated):
    """Float32 sums of exact products, for any number of rows."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(rows, outputs, generator=generator).bfloat16()
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    expected = grad.double().T @ x.double()
    results = []
    for threads in (1, 3):
        result = torch.full((outputs, inputs), torch.nan)
        emulated.call("weight_gradient", *map(block.address, (grad, x, result)), rows, outputs, inputs, threads)
        results.append(result)
    assert distance(results[0], expected) < 1e-6
    assert torch.equal(*results)


@pytest.mark.skipif(not X86, reason="flags of x86-64")
def test_a_matrix_unit_is_used_where_there_is_one(emulated):
    """Its instructions compile on any machine; where they run, they compute what the arrays do."""
    compiler = find_compiler()
    if subprocess.run([*compiler, "-march=sapphirerapids", "-E", "-xc", "/dev/null"], capture_output=True).returncode:
        pytest.skip("the compiler does not know a processor with a matrix unit")
    folder = Path(library.__file__).parent
    flags = [flag for flag in library.FLAGS if flag != "-shared"]
    for source in ("attention_forward.c", "attention_backward.c", "gradients.c"):
        command = [*compiler, *flags, "-march=sapphirerapids", "-fsyntax-only", str(folder / source)]
        assert subprocess.run(command, capture_output=True).returncode == 0, source
    if "amx_bf16" not in processor_features():
        pytest.skip("this processor has no matrix unit, or does not offer it")
    kernels = library.get_kernels()
    if not kernels.has_weight_gradient:
        pytest.skip("the system does not let this process use the matrix unit")
    for case in CASES[:2]:
        actual, expected = attention(kernels, case), attention(emulated, case)
        for name in NAMES:
            assert distance(actual[name], expected[name]) < (0.01 if name == "scale" else 2e-3), name
