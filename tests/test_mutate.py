"""mutate.py: the mutants of a piece of code, and the lists that it works by."""

import ast

import mutate


def changes(source):
    """The mutated sources, without those that only differ in how they are written."""
    return {changed for _, _, changed in mutate.mutants(source)}


def test_one_place_is_changed_at_a_time():
    assert changes("y = a + b") == {"y = a - b", "y = a"}
    assert changes("y = x < 2") == {"y = x <= 2", "y = x < 3"}
    assert changes("y = not a or b") == {"y = not a and b", "y = a or b"}
    assert changes("y = -x if a < b else True") == {
        "y = x if a < b else True",
        "y = -x if a <= b else True",
        "y = -x if not a < b else True",
        "y = -x if a < b else False",
    }
    assert changes("x *= 3") == {"x /= 3", "x *= 4"}


def test_what_is_no_mathematics_stays():
    source = '''
def f(x: Tensor[1] = None) -> Tensor[2]:
    """A docstring with 1 < 2."""
    assert x > 1
    raise ValueError(f"{x + 1}")
'''
    assert changes(source) == set()


def test_the_listed_files_exist():
    for module, tests in mutate.TESTS.items():
        assert next(mutate.mutants((mutate.ROOT / module).read_text(encoding="utf-8"))), module
        files, _, chosen = tests.partition(" -k ")
        functions = [
            node.name
            for file in files.split()
            for node in ast.walk(ast.parse((mutate.ROOT / file).read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        for word in chosen.split("|"):
            assert any(word in name for name in functions), (module, word)
