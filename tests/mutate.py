"""Mutation testing of the toolkit's mathematics: change one operator, number or condition at a time, and run the few tests
that should notice.

    make mutate                                                  # a sample of every module below
    make mutate MODULE=simmim/training/optim.py SAMPLE=0         # all mutants of one
    python tests/mutate.py --list

Works in a temporary copy; the working tree is never changed. Prints each mutant that no test noticed, and exits with 1 if
there are any. Survivors are killed by an assertion, or named in CONTRIBUTING.md with the reason.
"""

import argparse
import ast
import copy
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each module and the tests that should notice its mutants; `-k` chooses among them where the rest takes long.
TESTS = {
    "simmim/encoders/shifted_windows/geometry.py": "tests/test_geometry.py tests/test_golden.py",
    "simmim/encoders/swinv2/model.py": "tests/test_swinv2.py tests/test_swinv2_attention.py tests/test_golden.py",
    "simmim/encoders/layers.py": "tests/test_swinv2.py tests/test_fixed_order.py tests/test_compiling.py -k shapes|drop"
    "|depth|gather|projection|recompute|copy|identity|initial|independent",
    "simmim/encoders/position_tables.py": "tests/test_paper_encoders.py",
    "simmim/methods/canvas.py": "tests/test_canvas.py -k visible|uniform|decide|alone|full|normalized|tokens|padded|cannot"
    "|defaults|begin",
    "simmim/methods/contrast.py": "tests/test_contrast.py -k tones|average|momentum|copied|hand|weight|range|plan|gray",
    "simmim/methods/masking.py": "tests/test_masking.py",
    "simmim/methods/pixels.py": "tests/test_model.py tests/test_decode.py",
    "simmim/methods/simmim.py": "tests/test_model.py",
    "simmim/training/optim.py": "tests/test_optim.py",
    "simmim/training/progress.py": "tests/test_progress.py",
    "simmim/data/scene_draws.py": "tests/test_study_scenes.py tests/test_segmentation.py -k folds|pools|fifth",
    "simmim/evaluate/contest.py": "tests/test_contest.py -k paired",
    "simmim/evaluate/scores.py": "tests/test_feature_scores.py",
    "simmim/evaluate/neighbors.py": "tests/test_neighbors.py",
    "simmim/evaluate/paired.py": "tests/test_study_report.py",
    "simmim/evaluate/probe.py": "tests/test_linear_probe.py",
    "finetune/averaging.py": "tests/test_training_parts.py -k average|decay",
    "finetune/augment/affine.py": "tests/test_augment.py",
    "finetune/augment/mixing.py": "tests/test_batch_changes.py",
    "finetune/classification/folds.py": "tests/test_study.py tests/test_image_kinds.py -k folds|together|study_of_pages",
    "finetune/classification/balance.py": "tests/test_training_parts.py -k balance|weights",
    "finetune/dense/windows.py": "tests/test_sliding.py",
    "finetune/detection/ap.py": "tests/test_average_precision.py",
    "finetune/detection/assignment.py": "tests/test_detection_parts.py -k assign|object",
    "finetune/detection/boxes.py": "tests/test_detection_parts.py -k overlap|suppress|assign",
    "finetune/detection/condinst.py": "tests/test_instance_masks.py -k cell|loss|finite|stages",
    "finetune/detection/inference.py": "tests/test_detection_parts.py",
    "finetune/detection/losses.py": "tests/test_detection_parts.py -k loss|center",
    "finetune/detection/masks.py": "tests/test_mask_labels.py tests/test_instance_masks.py -k run_lengths|samples|own_scale",
    "finetune/detection/soft_masks.py": "tests/test_instance_masks.py -k masks|grids|objects",
    "finetune/detection/views.py": "tests/test_detection_parts.py",
    "finetune/label_study/gains.py": "tests/test_study_report.py",
    "finetune/label_study/chosen_rates.py": "tests/test_study_report.py",
    "finetune/segmentation/iou.py": "tests/test_segmentation.py -k iou|table|counts",
    "finetune/segmentation/module.py": "tests/test_segmentation.py -k loss|weight|training|validation",
    "finetune/segmentation/self_training/pseudo_masks.py": "tests/test_pseudo_masks.py -k parts|alignment|numpy|pasted",
    "finetune/segmentation/sliding.py": "tests/test_sliding.py",
    "finetune/self_training/pseudo_labels.py": "tests/test_self_training.py tests/test_pseudo_masks.py -k numpy|align|parts",
}
# Imported once, before the tests of each mutant.
LIBRARIES = (
    "torch",
    "numpy",
    "PIL.Image",
    "pytorch_lightning",
    "datasets",
    "torchmetrics",
    "sklearn.linear_model",
    "einops",
)
COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPARED |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
COMPUTED |= {ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}


def variants(node):
    """Replacements of an expression or statement, each changed in one place."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        yield ast.Compare(node.left, [COMPARED[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        yield ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right)
        if isinstance(node.op, ast.Add | ast.Sub):  # without one term
            yield node.left
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.If | ast.IfExp) and not is_negated_otherwise(node.test):
        yield type(node)(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.AugAssign) and type(node.op) in COMPUTED:
        yield ast.AugAssign(node.target, COMPUTED[type(node.op)](), node.value)


def is_negated_otherwise(test):
    """Whether another variant is the negation of this condition."""
    opposites = ast.Eq | ast.NotEq | ast.Is | ast.IsNot | ast.In | ast.NotIn
    return isinstance(test, ast.UnaryOp) or (isinstance(test, ast.Compare) and isinstance(test.ops[0], opposites))


def is_skipped(node):
    """Whether a node holds no mathematics: annotations, error messages, what types alone need, and assertions."""
    return isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.AnnAssign) and not (
        isinstance(node, ast.AnnAssign) and node.value is not None
    )


def places(tree):
    """(parent, field, index or None, node) of every node that may be mutated."""
    pending, found = [tree], []
    while pending:
        parent = pending.pop()
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list", "type_comment"):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else ((None, value),):
                if isinstance(node, ast.AST) and not is_skipped(node):
                    found.append((parent, field, index, node))
                    pending.append(node)
    return found


def put(parent, field, index, node):
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def mutants(source):
    """(line number, description, mutated source) of all mutants of a file."""
    tree = ast.parse(source)
    for parent, field, index, node in places(tree):
        for variant in variants(node):
            put(parent, field, index, ast.copy_location(copy.copy(variant), node))
            changed = ast.unparse(ast.fix_missing_locations(tree))
            put(parent, field, index, node)
            before, after = (ast.unparse(shown).splitlines()[0] for shown in (node, variant))
            yield node.lineno, f"{before}  ->  {after}", changed


def copied_tree(folder):
    """A copy of what tests need."""
    for name in ("simmim", "pretrain", "finetune", "configs", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "legacy-*"))
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def passes(folder, tests, timeout_s):
    """Whether the tests pass in a copy of the tree; a timeout counts as a failure.

    Runs in a fork of this process, which has imported the libraries but nothing of the toolkit.
    """
    files, _, chosen = tests.partition(" -k ")
    words = ["-q", "-x", "-p", "no:cacheprovider", *files.split(), *(["-k", chosen.replace("|", " or ")] if chosen else [])]
    pid = os.fork()
    if not pid:
        os.chdir(folder)
        os.setpgid(0, 0)
        output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.path[:] = [
            str(folder),
            str(folder / "tests"),
            *(path for path in sys.path if not path.startswith(str(ROOT / "tests"))),
        ]
        os._exit(pytest.main(words))
    end = time.monotonic() + timeout_s
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)
    return ended[1] == 0


def examine(module, sample, seed, folder):
    """Print and count the surviving mutants of one module."""
    path, source = folder / module, (ROOT / module).read_text(encoding="utf-8")
    began = time.monotonic()
    assert passes(folder, TESTS[module], 900), (folder / "output").read_text(encoding="utf-8")[-3000:]
    timeout_s = 3 * (time.monotonic() - began) + 20
    chosen = list(mutants(source))
    chosen = sorted(random.Random(seed).sample(chosen, sample)) if 0 < sample < len(chosen) else chosen
    survived = 0
    for line, description, changed in chosen:
        path.write_text(changed, encoding="utf-8")
        if passes(folder, TESTS[module], timeout_s):
            survived += 1
            print(f"{module}:{line}: {description}", flush=True)
    path.write_text(source, encoding="utf-8")
    print(f"{module}: {survived} of {len(chosen)} mutants survived, {time.monotonic() - began:.0f} s", flush=True)
    return survived


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(TESTS)}; all by default")
    parser.add_argument("--sample", type=int, default=8, help="mutants of each module, chosen at random; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--list", action="store_true", help="print the mutants without running tests")
    options = parser.parse_args(arguments)
    if unknown := set(options.modules) - TESTS.keys():
        parser.error(f"no tests are known for {', '.join(unknown)}: add a line to TESTS in tests/mutate.py")
    modules = options.modules or list(TESTS)
    if options.list:
        for module in modules:
            for line, description, _ in mutants((ROOT / module).read_text(encoding="utf-8")):
                print(f"{module}:{line}: {description}")
        return 0
    sys.dont_write_bytecode = True  # a mutant must not be taken for its unchanged file of the same second
    for library in LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory(prefix="simmim-mutants-") as folder:
        copied_tree(Path(folder))
        return int(sum(examine(module, options.sample, options.seed, Path(folder)) for module in modules) > 0)


if __name__ == "__main__":
    sys.exit(main())
