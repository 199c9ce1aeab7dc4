"""Several encoders on the same draws of labels: accuracies, paired differences and what each encoder costs.

Shape letters are as in `simmim.evaluate.report`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from simmim.evaluate.facts import HEADINGS
from simmim.evaluate.paired import p_text, p_value, t_interval
from simmim.evaluate.report import Report, check_report_file, write_report
from simmim.evaluate.scores import best_score, mean_scores
from simmim.files import atomic_write


class Difference(NamedTuple):
    """What the first encoder has over another, over the same draws, in percentage points.

    Attributes:
        mean: of the differences.
        spread: half the width of its 95 % interval by Student's t; nan for a single draw.
        p: of the two-sided paired t-test; nan for a single draw, and for equal differences.
    """

    mean: float
    spread: float
    p: float

    def cell(self) -> str:
        """As a cell of a table: "+1.2 ± 0.8 (p = 0.03)"."""
        if math.isnan(self.spread):
            return f"{self.mean:+.1f}"
        test = "" if math.isnan(self.p) else f" (p {p_text(self.p)})"
        return f"{self.mean:+.1f} ± {self.spread:.1f}{test}"


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """The difference of accuracies in [0, 1], draw by draw."""
    gains = [100 * (own - other) for own, other in zip(ours, theirs, strict=True)]
    return Difference(*t_interval(gains), p_value(gains))


def check_scipy() -> None:
    """Check that intervals can be computed, before minutes are spent on features.

    Raises:
        ValueError: when SciPy is not installed.
    """
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "intervals over several draws need SciPy, which is not installed: pip install 'simmim-toolkit[probe]'"
        ) from error


@dataclass(frozen=True)
class Contest:
    """Encoders compared on the same draws.

    Attributes:
        names: of the encoders, the first of which is compared with the others.
        reports: of each encoder, with the same draws.
    """

    names: tuple[str, ...]
    reports: tuple[Report, ...]

    def accuracies(self, number: int) -> tuple[str, list[float]]:
        """Of one encoder the feature that its training labels choose over all draws, and its accuracy in each draw.

        Where a class has a single label, which cannot be held out, the last feature of the encoder.
        """
        report = self.reports[number]
        best = best_score(mean_scores(report.draws), report.draws[0].baseline)
        candidates = [row.name for row in report.draws[0].rows if row.name != report.draws[0].baseline]
        feature = best.name if best else "final" if "final" in candidates else candidates[-1]
        return feature, [scores.row(feature).accuracy for scores in report.draws]

    def table(self) -> str:
        """A Markdown table with a row per encoder: what it is and costs, its accuracy, and the paired difference."""
        method = self.reports[0].comparison.method
        accuracy = "linear probe" if method == "probe" else "k-NN"
        lines = [
            f"| encoder | {accuracy}, % | {self.names[0]} minus it | feature | {' | '.join(HEADINGS)} |",
            "| :--- | ---: | ---: | :--- | :--- | ---: | ---: | ---: | :--- |",
        ]
        _, ours = self.accuracies(0)
        for number, (name, report) in enumerate(zip(self.names, self.reports)):
            feature, each = self.accuracies(number)
            mean, spread = t_interval([100 * value for value in each])
            shown = f"{mean:.1f}" if math.isnan(spread) else f"{mean:.1f} ± {spread:.1f}"
            difference = "" if number == 0 else paired_difference(ours, each).cell()
            lines.append(f"| {' | '.join([name, shown, difference, feature, *report.facts.cells()])} |")
        return "\n".join([*lines, "", self.explanation()])

    def explanation(self) -> str:
        """What the numbers are."""
        num_draws = len(self.reports[0].draws)
        chosen = "The feature of each encoder is chosen by its training labels alone."
        if num_draws == 1:
            return f"{chosen} One draw of labels says nothing of chance: --seeds 5 gives intervals of the differences."
        return (
            f"{chosen} ± is the 95 % interval of the mean over {num_draws} draws of labels by Student's t, the same draws "
            "for all encoders; the difference is paired. An interval that holds 0 is a tie: then the cost decides."
        )

    def as_dict(self) -> dict:
        """Everything as plain values for JSON."""
        _, ours = self.accuracies(0)
        rows = []
        for number, (name, report) in enumerate(zip(self.names, self.reports)):
            feature, each = self.accuracies(number)
            rows.append(
                {
                    "name": name,
                    "feature": feature,
                    "accuracy": each,
                    "difference": paired_difference(ours, each)._asdict() if number else None,
                    "facts": report.facts.as_dict(),
                }
            )
        return {"encoders": rows, "reports": [report.as_dict() for report in self.reports]}


def write_contest(contest: Contest, out: str | Path) -> Path:
    """Write `out`, whole or not at all, in the format of its suffix, as `write_report`; of several encoders a CSV file has a
    row per encoder and draw.

    Raises:
        ValueError: as `check_report_file`.
    """
    if len(contest.reports) == 1:
        return write_report(contest.reports[0], out)
    path = check_report_file(out)
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".json":
            file.write(json.dumps(contest.as_dict(), indent=2, default=str) + "\n")
        elif path.suffix == ".md":
            file.write("\n\n".join([contest.table(), *(report.table() for report in contest.reports)]) + "\n")
        else:
            writer = csv.writer(file)
            writer.writerow(["encoder", "seed", "feature", "accuracy"])
            for number, name in enumerate(contest.names):
                feature, each = contest.accuracies(number)
                writer.writerows([name, seed, feature, value] for seed, value in zip(contest.reports[0].seeds, each))
    return path


def names_of(paths: Sequence[str]) -> tuple[str, ...]:
    """The names of files, folders or ids in tables: their last parts, numbered where two are equal."""
    names: list[str] = []
    for path in paths:
        name, number = Path(path).name.removeprefix("timm:"), 2
        while name in names:
            name, number = f"{Path(path).name} {number}", number + 1
        names.append(name)
    return tuple(names)
