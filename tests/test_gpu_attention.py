"""The kernels for a GPU, as far as a machine with none can tell: interpreted, and compiled for what it is not."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simmim.encoders.layers import RowIndex
from simmim.encoders.swinv2.kernels import self_test
from simmim.encoders.swinv2.kernels.gpu import MAX_WINDOW_TOKENS, Blocks, supports_window_attention
from simmim.encoders.swinv2.model import attend

TESTS = Path(__file__).resolve().parent / "gpu_attention.py"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_kernels_and_what_uses_them():
    """On a GPU where there is one."""
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent.parent, timeout=600)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) > 30
    assert "skipped" not in ran.stdout


def test_takes_nothing_on_a_cpu():
    assert not supports_window_attention(torch.device("cpu"), torch.bfloat16, 144, 32)


def compiled_kernel(kernel, architecture, tokens, dtype, folder, monkeypatch):
    """A kernel for windows of some tokens and heads of 32, compiled without a GPU, and how its window is divided."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from simmim.encoders.swinv2.kernels import triton_kernels

    function, blocks = getattr(triton_kernels, kernel), Blocks.of(tokens, 32, dtype, kernel)
    constants = {
        "N": tokens,
        "D": 32,
        "HAS_REGIONS": True,
        "WHOLE": blocks.whole,
        "REST": blocks.rest,
        "DIM": blocks.dim,
        "BLOCK": blocks.block,
        "PRECISION": "tf32",
    }
    number = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    types = dict.fromkeys(("qkv", "mixed", "grad_mixed", "grad_qkv"), number) | dict.fromkeys(constants, "constexpr")
    types |= {"token_of": "*i32", "region_of": "*u8"}
    types |= dict.fromkeys(("tokens", "windows", "label_rows", "heads", "shares", "num_windows", "chunks"), "i32")
    signature = {name: types.get(name, "*fp32") for name in function.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(signature) if signature[name].startswith("*")}
    constants = {(function.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    source = ASTSource(function, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options), blocks


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("tokens", [36, 144])
@pytest.mark.parametrize("kernel", ["forward", "backward_of_queries", "backward_of_keys"])
def test_registers_suffice(kernel, tokens, architecture, tmp_path, monkeypatch):
    """For windows of 6 × 6 and 12 × 12: nothing is spilled, no warp repeats another's work, roots and quotients are rounded
    to nearest, as the interpreter's are, and the exponential is one instruction."""
    from triton.backends import nvidia

    compiled, blocks = compiled_kernel(kernel, architecture, tokens, torch.bfloat16, tmp_path, monkeypatch)
    num_row_blocks = blocks.block // 16  # of one warp each, if there is more than one
    layout = f"{blocks.warps}, 1" if num_row_blocks == blocks.warps > 1 else f"1, {blocks.warps}"
    assert set(re.findall(r"warpsPerCTA = \[([\d, ]+)\], instrShape", compiled.asm["ttgir"])) == {layout}
    assert set(re.findall(r"ex2\S*", compiled.asm["ptx"])) == {"ex2.approx.ftz.f32"}
    assert set(re.findall(r"(?:sqrt|div|rcp)\.(?:rn|full|approx)", compiled.asm["ptx"])) == {"sqrt.rn", "div.rn"}
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"], encoding="utf-8")
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    assembler = Path(nvidia.__file__).parent / "bin" / "ptxas"
    said = subprocess.run(
        [assembler, "-v", "--gpu-name", target, tmp_path / "kernel.ptx", "-o", os.devnull], capture_output=True, text=True
    ).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", ["forward", "backward_of_queries", "backward_of_keys"])
def test_the_largest_windows_fit(kernel, dtype, tmp_path, monkeypatch):
    """In the shared memory of compute capability 8.0, 163 KiB; and what they ask for is what is checked before a launch."""
    tokens = MAX_WINDOW_TOKENS[dtype]
    compiled, blocks = compiled_kernel(kernel, 80, tokens, dtype, tmp_path, monkeypatch)
    assert compiled.metadata.shared <= blocks.shared_memory(dtype) <= 163 * 1024
    assert kernel != "backward_of_keys" or compiled.metadata.shared > 0.95 * blocks.shared_memory(dtype)


@pytest.mark.parametrize("dtype, tokens", [(torch.bfloat16, 36), (torch.float16, 16)])
def test_a_trial_refuses_no_good_kernels(dtype, tokens, monkeypatch):
    """By whatever numbers they are compared: those of a kernel that computes in float64."""

    def exact(qkv, q_bias, v_bias, scale, bias, token_of, regions, images):
        rows = qkv.double() + torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))
        windows = rows.view(-1, tokens, 3, len(scale), rows.shape[1] // 3 // len(scale))
        index = RowIndex(torch.arange(tokens**2))
        mixed = attend(windows, scale.double(), bias.double().flatten(1).T, index, regions)
        return mixed.reshape(len(qkv), -1).to(qkv.dtype)

    monkeypatch.setattr(self_test, "window_attention", exact)
    for seed in range(24):
        assert self_test.find_difference(torch.device("cpu"), dtype, tokens, 32, attend, seed) == ""
