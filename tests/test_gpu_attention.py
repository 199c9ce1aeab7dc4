"""The kernels for a GPU, as far as a machine with none can tell: interpreted, and compiled for what it is not."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simmim.encoders.swinv2.kernels.gpu import Blocks, supports_window_attention

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


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kernel", ["forward", "backward_of_queries", "backward_of_keys"])
def test_registers_suffice(kernel, architecture, tmp_path, monkeypatch):
    """For windows of 12 × 12 and heads of 32, without a GPU: nothing is spilled, and no warp repeats another's work."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from simmim.encoders.swinv2.kernels import triton_kernels

    function, blocks = getattr(triton_kernels, kernel), Blocks.of(144, 32, torch.bfloat16)
    constants = {
        "N": 144,
        "D": 32,
        "HAS_REGIONS": True,
        "WHOLE": blocks.whole,
        "REST": blocks.rest,
        "DIM": blocks.dim,
        "BLOCK": blocks.block,
        "PRECISION": "tf32",
    }
    types = dict.fromkeys(("qkv", "mixed", "grad_mixed", "grad_qkv"), "*bf16") | dict.fromkeys(constants, "constexpr")
    types |= {"token_of": "*i32", "region_of": "*u8"}
    types |= dict.fromkeys(("tokens", "windows", "label_rows", "heads", "shares", "num_windows", "chunks"), "i32")
    signature = {name: types.get(name, "*fp32") for name in function.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(signature) if signature[name].startswith("*")}
    constants = {(function.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    source = ASTSource(function, signature, constants, aligned)
    compiled = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert set(re.findall(r"warpsPerCTA = \[([\d, ]+)\], instrShape", compiled.asm["ttgir"])) == {f"1, {blocks.warps}"}
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"], encoding="utf-8")
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    assembler = Path(nvidia.__file__).parent / "bin" / "ptxas"
    said = subprocess.run(
        [assembler, "-v", "--gpu-name", target, tmp_path / "kernel.ptx", "-o", os.devnull], capture_output=True, text=True
    ).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said
