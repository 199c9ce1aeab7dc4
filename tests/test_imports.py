"""Which file may know which: read from the import statements, and from what importing really loads."""

import ast
import functools
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("pretrain", "finetune")  # folders at the top, packages in simmim


def files_of_the_library():
    """Dotted module name to file; a package has the name of its folder."""
    found = {}
    for folder in ("simmim", *STAGES):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] in {("simmim", stage) for stage in STAGES}:
                continue  # a link to the folder at the top
            parts = ("simmim", *parts) if parts[0] in STAGES else parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files_of_the_library()
LEAVES = {path.stem for path in (ROOT / "simmim").glob("*.py")} - {"__init__", "__main__"}
# Of each package what of simmim its files may import. One way: a package imports those above it here.
ALLOWED = {
    "__main__": {"cli"},
    "encoders": LEAVES,
    "methods": LEAVES | {"encoders"},
    "data": LEAVES,
    "checkpoints": LEAVES | {"encoders", "methods"},
    "planning": LEAVES | {"encoders", "methods"},
    "evaluate": LEAVES | {"encoders", "methods", "data", "checkpoints"},
    "training": LEAVES | {"encoders", "methods", "data", "checkpoints", "planning", "evaluate"},
    "pretrain": LEAVES | {"encoders", "methods", "data", "checkpoints", "planning", "evaluate", "training"},
    "finetune": LEAVES | {"encoders", "methods", "data", "checkpoints", "planning", "evaluate", "training"},
}
# Who may import concrete encoders besides the registry: the rows of the format tables.
FORMAT_ROWS = "simmim.checkpoints.formats."
FAMILIES = ("swinv2", "swin", "vit")
TRAINING = ("pytorch_lightning", "datasets", "tensorboard", "torchmetrics", "jsonargparse")
OPTIONAL = ("torchvision", "triton", "pyarrow", "pandas", "sklearn", "onnx", "onnxruntime")
HEAVY = ("torch", "numpy", "PIL", "safetensors", *TRAINING, *OPTIONAL)
LONGEST_FILE, LONGEST_FUNCTION = 500, 60


@functools.cache
def tree_of(module):
    """The syntax tree of a module's file."""
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imported(tree, for_types=True):
    """Dotted names of all modules that a tree imports, wherever in it; relative imports do not occur.

    Args:
        for_types: also what is imported under TYPE_CHECKING.
    """
    names, pending = set(), [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if for_types or not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"):
            pending += ast.iter_child_nodes(node)
    return names


@functools.cache
def own_modules(module, for_types=True):
    """The modules of this project that `module` imports, without the packages that it lies in."""
    found = {name for name in imported(tree_of(module), for_types) if name in FILES}
    return {name for name in found if not f"{module}.".startswith(f"{name}.")}


def package_of(module):
    """The part of simmim that a module belongs to: a package or a leaf."""
    return module.split(".")[1] if "." in module else ""


def test_files_are_found():
    """The reading itself: known imports are seen, those inside functions too, and every allowed package exists."""
    assert {"simmim", "simmim.encoders.base", "simmim.pretrain.run", "simmim.finetune.run"} <= FILES.keys()
    assert "simmim.encoders.base" in own_modules("simmim.methods.simmim")
    assert "simmim.encoders.cost" in own_modules("simmim.encoders.base")
    assert "simmim.encoders.cost" not in own_modules("simmim.encoders.base", for_types=False)
    assert ALLOWED.keys() | LEAVES | {"cli", ""} == {package_of(module) for module in FILES}


def test_packages_import_one_way():
    wrong = {}
    for module in FILES:
        package = package_of(module)
        others = {package_of(name) for name in own_modules(module)} - {package, ""}
        # No library file imports the command.
        allowed = LEAVES if package in LEAVES else ALLOWED.get(package, others - {"cli"})
        if not others <= allowed:
            wrong[module] = others - allowed
    assert wrong == {}


def test_only_registries_know_concrete_encoders_and_methods():
    """All else goes by the protocols in encoders/base.py and methods/base.py."""
    protocol = {"simmim.methods", "simmim.methods.base", "simmim.methods.registry"}
    wrong = {}
    for module in FILES:
        concrete = set()
        for family in FAMILIES if module != "simmim.encoders.registry" else ():
            folder = f"simmim.encoders.{family}."
            if not f"{module}.".startswith((folder, f"{FORMAT_ROWS}{family}.")):
                concrete |= {name for name in own_modules(module) if f"{name}.".startswith(folder)}
        if package_of(module) != "methods":
            concrete |= {name for name in own_modules(module) if package_of(name) == "methods"} - protocol
        if concrete:
            wrong[module] = concrete
    assert wrong == {}


def test_tasks_do_not_import_one_another():
    """What two of them need is in a package that knows neither, as simmim.finetune.dense."""
    tasks = {f"simmim.finetune.{name}" for name in ("classification", "segmentation", "detection")}
    assert tasks <= FILES.keys()
    wrong = {}
    for module in FILES:
        for folder in (*tasks, "simmim.finetune.dense"):
            if f"{module}.".startswith(f"{folder}."):
                others = tuple(f"{name}." for name in tasks - {folder})
                wrong[module] = {name for name in own_modules(module) if f"{name}.".startswith(others)}
    assert len(wrong) > 50 and {module: names for module, names in wrong.items() if names} == {}


def test_no_imports_go_in_a_circle():
    """Types alone do not count."""
    graph = {module: own_modules(module, for_types=False) for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_model_files_know_no_training():
    """No Trainer, logger, rank or path where encoders and methods are written down."""
    for module in FILES:
        if module.startswith(("simmim.methods", "simmim.encoders")) and ".kernels" not in module:
            names = {name.partition(".")[0] for name in imported(tree_of(module))}
            assert names.isdisjoint((*TRAINING, "PIL", "os", "pathlib", "logging", "argparse")), module


def is_table(function):
    """Whether a function is a table: one call or literal after its docstring."""
    return len([node for node in function.body if not isinstance(node, ast.Expr)]) <= 1


def test_files_and_functions_are_short():
    """A file holds one concept. Kernels are as long as they are."""
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    assert {module: length for module, length in lengths.items() if length > LONGEST_FILE} == {}
    functions = {
        (module, node.name): node.end_lineno - node.lineno + 1
        for module in FILES
        if ".kernels." not in module
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_table(node)
    }
    assert {name: length for name, length in functions.items() if length > LONGEST_FUNCTION} == {}


def test_test_files_are_short():
    """A test file holds one concept, too."""
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_the_command_imports_lazily():
    """At their tops the files that every call loads import nothing but the standard library and each other."""
    for module in ("simmim.cli", "simmim.cli.main", "simmim.cli.arguments", "simmim.cli.allocator", "simmim.cli.notices"):
        body = [node for node in tree_of(module).body if isinstance(node, ast.Import | ast.ImportFrom)]
        tree = ast.Module(body, type_ignores=[])
        light = ("simmim.cli", "simmim.messages", "simmim.renamed_settings")
        names = {name.partition(".")[0] for name in imported(tree) if not name.startswith(light)}
        assert names <= set(sys.stdlib_module_names), (module, names - set(sys.stdlib_module_names))


MODEL = ("torch", "numpy")  # torch itself imports numpy
FILES_TOO = (*MODEL, "safetensors", "PIL")
DATA_TOO = (*FILES_TOO, "datasets", "pyarrow", "pandas")
# Statements that one process executes in turn, and which of what is large or optional is loaded after each.
STEPS = (
    ("import simmim, simmim.pretrain, simmim.finetune, simmim.cli, simmim.defaults", ()),
    ("from simmim.checkpoints.formats.registry import names; names()", ()),  # help texts list them
    ("import simmim.encoders.registry, simmim.encoders.swinv2, simmim.methods.simmim, simmim.training.optim", MODEL),
    ("import simmim.encoders.swinv2.kernels.gpu", MODEL),
    ("from simmim import SwinV2, SimMIM, load_encoder", (*MODEL, "safetensors")),
    # Settings, which --help needs at once.
    ("import simmim.pretrain.settings, simmim.finetune.settings, simmim.data", FILES_TOO),
    ("import simmim.evaluate", FILES_TOO),
    ("import simmim.checkpoints.formats.onnx, simmim.checkpoints.formats.swinv2.onnx", FILES_TOO),
    # Lightning takes seconds, which predictions do not need.
    ("from simmim.finetune import predict, segment, detect", DATA_TOO),
    ("from simmim.finetune.registry import TASKS, task_named; [task_named(task) for task in TASKS]", DATA_TOO),
    ("import simmim.training.devices, simmim.training.settings", DATA_TOO),
)


def test_importing_loads_what_is_needed():
    code = "import sys\n"
    for statement, _ in STEPS:
        code += f"{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    for (statement, allowed), loaded in zip(STEPS, done.stdout.splitlines(), strict=True):
        assert set(loaded.split()) <= set(allowed), statement


@pytest.mark.parametrize("package", ["simmim", "simmim.pretrain", "simmim.finetune"])
def test_public_names_resolve(package):
    """Every name in a package's __all__ is there, and another is refused as usual."""
    module = sys.modules[__import__(package).__name__]
    for part in package.split(".")[1:]:
        module = getattr(module, part)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'no_such_name'"):
        module.no_such_name  # noqa: B018
