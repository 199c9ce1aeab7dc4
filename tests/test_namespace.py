"""One top-level package, `simmim`: a user's own `pretrain` and `finetune` do not disturb it, and the wheel is complete."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A pre-training run of four steps.
TINY = [
    *("--image-size", "32", "--epochs", "1", "--batch-size", "2", "--workers", "0", "--precision", "32-true"),
    *("--model.encoder.embed_dim", "16", "--model.encoder.depths", "[1,1]", "--model.encoder.num_heads", "[1,2]"),
    *("--preset", "nano", "--trainer.accelerator", "cpu"),
]


def run(words, cwd, path=ROOT):
    """A program in a folder; `path` is where Python finds the library."""
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, f"{words}: {ended.stdout}{ended.stderr}"
    return ended.stdout


# --- a user's own packages -------------------------------------------------------------------------------------------


@pytest.fixture
def own_folder(tmp_path):
    """A folder with packages and a module of the stages' names. Importing one of them fails."""
    for name in ("pretrain/__init__.py", "finetune/__init__.py", "pretrain.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"raise RuntimeError('the user\\'s own {name}')\n")
    return tmp_path


def test_the_installed_command(own_folder):
    """The console script is `simmim.cli:main`. Here as Python calls it, with the folder first on the path."""
    script = "import sys; sys.path.insert(0, ''); from simmim.cli import main; sys.exit(main())"
    for words in (["pretrain", "--help"], ["finetune", "segmentation", "--help"]):
        assert f"usage: simmim {words[0]}" in run([sys.executable, "-c", script, *words], own_folder)


def test_python_m_by_torchrun(own_folder, digits):
    """`python -m simmim.cli`, which puts the current folder first on the path, as torchrun starts it in each process."""
    images = a_few(digits.unlabeled, own_folder / "images")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "simmim.cli"]
    out = run([*command, "pretrain", "--data", images, "--out", "run", "--devices", "2", *TINY], own_folder)
    assert out.count("next: simmim reconstruct") == 1, "the first process alone says it"
    assert (own_folder / "run" / "encoder" / "encoder.safetensors").is_file()


def a_few(source, folder):
    """Eight of the images of `source` in a folder of their own."""
    folder.mkdir()
    for path in sorted(source.iterdir())[::30][:8]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout."""
    for name in ("setuptools", "pip"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: it builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy of what belongs to the package: setuptools writes build/ and *.egg-info beside its source.
    source = folder / "source"
    for name in ("simmim", "pretrain", "finetune", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*build, "--wheel-dir", folder, source], folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_simmim_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"simmim"}
    here = files_of(ROOT / "simmim", "simmim") | files_of(ROOT / "pretrain", "simmim/pretrain")
    here |= files_of(ROOT / "finetune", "simmim/finetune") | files_of(ROOT / "configs", "simmim/configs")
    assert "simmim/py.typed" in here and "simmim/configs/pretrain/demo.yaml" in here
    assert any(name.endswith("kernels/attention_forward.c") for name in here) and any(name.endswith(".h") for name in here)
    assert {name for name in names if ".dist-info/" not in name} == here
    (top_level,) = (name for name in names if name.endswith(".dist-info/top_level.txt"))
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(top_level).decode().split() == ["simmim"]


def files_of(folder, prefix):
    """Names in the wheel of all files in a folder of the checkout, links aside."""
    found = set()
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        inside = Path(path).relative_to(folder).as_posix()
        found |= {(Path(prefix) / inside / name).as_posix() for name in files}
    return found


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    """Unpacked, as pip would: the command starts, and recipes and kernels are found."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    path = tmp_path / "unpacked"
    assert "usage: simmim demo" in run([sys.executable, "-m", "simmim.cli", "demo", "--help"], tmp_path, path)
    script = """
import simmim, simmim.pretrain, simmim.finetune
from simmim.cli.demo import recipe_path
from simmim.cli.train import finetune_settings, pretrain_settings
from simmim.encoders.swinv2 import kernels
for module in (simmim, simmim.pretrain, simmim.finetune, kernels):
    print(module.__file__)
pretrain, finetune = recipe_path("pretrain/demo.yaml"), recipe_path("finetune/demo.yaml")
print(pretrain, finetune, sep="\\n")
words = ["--data", "x", "--out", "y"]
assert pretrain_settings(["--config", str(pretrain), *words]).preset == "nano"
assert finetune_settings("classification", ["--config", str(finetune), *words]).steps == 700
"""
    found = run([sys.executable, "-c", script], tmp_path, path).splitlines()
    assert len(found) == 6 and all(file.startswith(f"{path}/simmim/") for file in found), found
