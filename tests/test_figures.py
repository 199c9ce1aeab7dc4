"""Figures that were measured say when: every table of them names, in its section, a commit, a date and the processor or that
it was not noted; every recipe that was measured a commit and a date."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
COMMIT, DATE = r"\b(?=[0-9a-f]*[0-9])[0-9a-f]{7}\b", r"\b20\d\d-\d\d-\d\d\b"
PROCESSOR = r"\bZen \d|\bprocessor(?:'s model)? was not noted|\bprocessor not noted"
NOT_MEASURED = ("Stopping and resuming",)  # a table of exit codes
FIGURE = r"\s*\**[+−]?\d[\d.,]*(?: | |%|×|±|\*|,|$)"


def sections(page):
    """Title and text of what stands between two headings, blocks of code left out."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    parts = re.split(r"^(#+ .*)$", text, flags=re.M)
    return list(zip(parts[1::2], parts[2::2]))


def holds_figures(section):
    """Whether a table of the section has at least as many figures as rows, beside its first column."""
    for table in re.findall(r"(?:^\|.*\n)+", section, re.M):
        rows = [line.strip().strip("|").split("|")[1:] for line in table.splitlines()[2:]]
        if rows and sum(bool(re.match(FIGURE, cell)) for row in rows for cell in row) >= len(rows) / 2:
            return True
    return False


TABLES = [
    (page, title, text)
    for page in PAGES
    for title, text in sections(page)
    if holds_figures(text) and title.lstrip("# ") not in NOT_MEASURED
]


def test_tables_are_found():
    found = {
        (page.name if page.parent != ROOT / "benchmarks" else "benchmarks", title.lstrip("# ")) for page, title, _ in TABLES
    }
    assert {
        ("README.md", "What pre-training gains"),
        ("results.md", "Fashion-MNIST"),
        ("scaling.md", "Planning a run"),
        ("benchmarks", "The training step"),
        ("benchmarks", "Stability"),
    } <= found


@pytest.mark.parametrize("page, title, text", TABLES, ids=[f"{page.stem}-{title}" for page, title, _ in TABLES])
def test_a_table_of_figures_says_when_it_was_made(page, title, text):
    words = " ".join(text.split())
    for what, pattern in (("commit", COMMIT), ("date", DATE), ("processor", PROCESSOR)):
        assert re.search(pattern, words), f"{page.name}, {title}: no {what}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_that_was_measured_says_when(path):
    lines = [
        line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")
    ]
    text = " ".join(lines)
    (measured,) = re.findall(r"Measured: (.*)", text)
    if not re.match(r"not yet|see ", measured):
        assert re.search(COMMIT, measured) and re.search(DATE, measured), measured


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
