"""Figures that were measured say when: every table of them names, beside it or at the beginning of its section, a commit, a
date, the processor or that it was not noted, and a command or that no script repeats it; every recipe that was measured a
commit, a date and the processor."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
COMMIT, DATE = r"\b(?=[0-9a-f]*[0-9])[0-9a-f]{7}\b", r"\b20\d\d-\d\d-\d\d\b"
PROCESSOR = r"\bZen \d|\bXeon \(|\bprocessor(?:'s model)? was not noted|\bprocessor not noted"
COMMAND = r"```(?:console|sh)$|`[^`]*\b(?:\w+\.py|make \w+|simmim \w+)\b[^`]*`|no script repeats|\[Commands"
NOT_MEASURED = ("Stopping and resuming",)  # a table of exit codes
FIGURE = r"\s*\**[+−]?\d[\d.,]*(?: | |%|×|±|\*|,|$)"


def sections(page):
    """Title and text of what stands between two headings; a line that begins with # in a block of code is none."""
    text = page.read_text(encoding="utf-8")
    hidden = re.sub(r"^```.*?^```$", lambda block: "`" * len(block[0]), text, flags=re.M | re.S)
    heads = [*re.finditer(r"^#+ .*$", hidden, re.M)]
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return [(head[0].lstrip("# "), text[head.end() : end]) for head, end in zip(heads, ends)]


def is_measured(table):
    """Whether a table has at least half as many figures as rows, beside its first column."""
    rows = [line.strip().strip("|").split("|")[1:] for line in table.splitlines()[2:]]
    return bool(rows) and sum(bool(re.match(FIGURE, cell)) for row in rows for cell in row) >= len(rows) / 2


def tables_of(section):
    """The text that is to say where its figures are from, of each measured table: what stands before the first such table,
    and between this one and its neighbors."""
    parts = re.split(r"((?:^\|.*\n)+)", section, flags=re.M)
    measured = [number for number in range(1, len(parts), 2) if is_measured(parts[number])]
    for number, before, after in zip(measured, [-1, *measured], [*measured[1:], len(parts)]):
        yield "".join(parts[: measured[0]] + parts[before + 1 : number] + parts[number + 1 : after])


TABLES = [
    (page, f"{title}, table {number}", text)
    for page in PAGES
    for title, section in sections(page)
    if title not in NOT_MEASURED
    for number, text in enumerate(tables_of(section), 1)
]


def test_tables_are_found():
    found = {(page.name if page.parent != ROOT / "benchmarks" else "benchmarks", title) for page, title, _ in TABLES}
    assert {
        ("README.md", "What pre-training gains, table 3"),
        ("results.md", "Fashion-MNIST, table 1"),
        ("scaling.md", "Planning a run, table 1"),
        ("benchmarks", "The training step, table 5"),
        ("benchmarks", "Stability, table 1"),
    } <= found


@pytest.mark.parametrize("page, title, text", TABLES, ids=[f"{page.stem}-{title}" for page, title, _ in TABLES])
def test_a_table_of_figures_says_when_it_was_made(page, title, text):
    words = " ".join(text.split())
    for what, pattern in (("commit", COMMIT), ("date", DATE), ("processor", PROCESSOR)):
        assert re.search(pattern, words), f"{page.name}, {title}: no {what}"
    assert re.search(COMMAND, text, re.M), f"{page.name}, {title}: no command"


def test_a_table_among_others_is_found_out():
    """What another table of the section says does not count for it."""
    table = "| | a |\n| --- | ---: |\n| x | 1.0 |\n"
    told = "(`step.py`, 1234abc, 2026-11-30, Zen 4)\n\n"
    both = [
        *tables_of(
            f"An introduction.\n\n{table}\n{told}Words.\n\n{table}\n| | a |\n| --- | --- |\n| x | no figure |\n\nEnd."
        )
    ]
    assert [told in text for text in both] == [True, True] and "End." in both[1] and "End." not in both[0]
    three = [*tables_of(f"{table}\n{told}{table}\nWords.\n\n{table}")]
    assert [told in text for text in three] == [True, True, False]
    assert [told in text for text in tables_of(f"{told}{table}\nWords.\n\n{table}")] == [True, True]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_that_was_measured_says_when(path):
    lines = [
        line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")
    ]
    text = " ".join(lines)
    (measured,) = re.findall(r"Measured: (.*)", text)
    if not re.match(r"not yet|see ", measured):
        assert re.search(COMMIT, measured) and re.search(DATE, measured), measured
        assert re.search(PROCESSOR, text), f"{path.name}: no processor"


def test_the_commits_are_this_repository_s():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("no repository")
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True).stdout != "false\n":
        pytest.skip("not the whole repository")
    named = {name for path in (*PAGES, *RECIPES) for name in re.findall(COMMIT, path.read_text(encoding="utf-8"))}
    # Not by asking for each: a checkout keeps for a while what its history has lost, and a clone has never had it.
    history = subprocess.run([*git, "rev-list", "HEAD"], capture_output=True, text=True, check=True).stdout.split()
    unknown = named - {commit[:7] for commit in history}
    assert len(named) > 10 and not unknown
