"""Which file may know which: read from the import statements, and from what importing really loads."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("simmim", "pretrain", "finetune")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
LEAVES = ("allocator", "arguments", "fused", "masking", "optim", "visualize", "defaults", "digits", "files")
# Of the files that are no leaves: what of simmim each may import.
ALLOWED = {
    "data": {"defaults", "files"},
    "model": {"fused", "swinv2", "masking"},
    "checkpoint": {"files", "swinv2"},
    "convert": {"checkpoint", "files", "swinv2"},
    "evaluate": {"checkpoint", "data", "files", "swinv2"},
    "plan": {"defaults", "masking", "model", "swinv2"},
    "run_folder": {"files"},
    "swinv2": {"fused"},
    "training": {"convert", "data", "files", "fused", "optim", "run_folder", "swinv2"},
}
TRAINING = ("pytorch_lightning", "datasets", "tensorboard", "torchmetrics", "jsonargparse")
HEAVY = ("torch", "numpy", "PIL", "safetensors", *TRAINING)


def imported(tree):
    """Dotted names of all modules that a file imports, wherever in it; relative imports do not occur."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(module):
    """(package, file) pairs of this project's modules that `module` imports; file is "" for a package itself."""
    found = set()
    for name in imported(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        package, _, rest = name.partition(".")
        if package in PACKAGES:
            file = rest.split(".")[0]
            inside = any(name == f"{package}.{file}" or name.startswith(f"{package}.{file}.") for name in FILES)
            found.add((package, file if inside else ""))
    home, _, rest = module.partition(".")
    return found - {(home, ""), (home, rest.partition(".")[0])}


def loaded_by(statement, names):
    """Which of `names` are loaded after `statement` in a new Python."""
    code = f"import sys\n{statement}\nprint(*[name for name in {tuple(names)!r} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_files_are_found():
    """The reading itself: known imports are seen, those inside functions too."""
    assert {"simmim.encoders.swinv2", "simmim.cli", "simmim.pretrain.run", "simmim.finetune.run"} <= FILES.keys()
    assert ("simmim", "swinv2") in ours("simmim.methods.simmim") and ("simmim", "training") in ours("simmim.pretrain.run")
    assert {("finetune", ""), ("pretrain", "")} <= ours("simmim.cli"), "imported inside functions"


@pytest.mark.parametrize("module", sorted(FILES))
def test_packages_import_downwards(module):
    package = module.partition(".")[0]
    allowed = {"simmim": {"simmim"}, "pretrain": {"simmim", "pretrain"}, "finetune": {"simmim", "finetune"}}[package]
    if module != "simmim.cli":
        assert {other for other, _ in ours(module)} <= allowed
    assert ("simmim", "cli") not in ours(module), "nobody imports the command"


@pytest.mark.parametrize("module", sorted(FILES))
def test_files_of_the_library_know_only_what_they_need(module):
    package, _, rest = module.partition(".")
    file = rest.partition(".")[0]  # of a folder of the library, the folder
    if package == "simmim" and file not in ("cli", "__init__"):
        known = {name for other, name in ours(module) if other == "simmim"}
        assert known <= (set() if file in LEAVES else ALLOWED[file])


def test_model_files_know_no_training():
    """No Trainer, logger, rank or path where the method is written down."""
    for file in ("swinv2", "masking", "model", "optim"):
        tree = ast.parse(FILES[f"simmim.{file}"].read_text(encoding="utf-8"))
        names = {name.partition(".")[0] for name in imported(tree)}
        assert names.isdisjoint((*TRAINING, "PIL", "os", "pathlib", "logging", "argparse")), file


def test_the_command_imports_stages_lazily():
    """At their tops the command and what reads its words import nothing but the standard library."""
    own = ("simmim.cli.allocator", "simmim.cli.arguments")
    for file in ("simmim.cli", *own):
        tree = ast.parse(FILES[file].read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name.partition(".")[0] for name in imported(tree) if not name.startswith(own)}
        assert names <= set(sys.stdlib_module_names), names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("statement", ["import simmim, pretrain, finetune", "import simmim.cli, simmim.defaults"])
def test_importing_packages_loads_nothing_heavy(statement):
    assert loaded_by(statement, HEAVY) == []


def test_importing_the_model_loads_no_training():
    names = ("torch", "torchvision", "PIL", *TRAINING)
    assert loaded_by(
        "import simmim.encoders.swinv2, simmim.methods.simmim, simmim.methods.masking, simmim.training.optim", names
    ) == ["torch"]
    assert loaded_by("from simmim import SwinV2, SimMIM, load_encoder", names) == ["torch"]


def test_settings_load_no_training():
    """What --help needs; it should appear at once."""
    assert loaded_by("import simmim.pretrain.settings, simmim.finetune.settings, simmim.data", TRAINING) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_resolve(package):
    """Every name in a package's __all__ is there, and another is refused as usual."""
    module = __import__(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'no_such_name'"):
        module.no_such_name  # noqa: B018
