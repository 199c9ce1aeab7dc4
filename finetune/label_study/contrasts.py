"""Which arms of a study are compared with which, and what the difference is called."""

from __future__ import annotations

from typing import NamedTuple

from simmim.finetune.label_study.results import StudyResult
from simmim.finetune.label_study.settings import PLAIN, PRETRAINED, SCRATCH, SEMI


class Contrast(NamedTuple):
    """Two arms that differ in what is asked about.

    Attributes:
        first, second: names of the arms.
        subject: what the first has and the second has not, as the subject of a sentence.
        without: what labels are worth "without …"; empty where the second is another encoder.
        given: what both have beside labels, to be added to them; empty for nothing.
    """

    first: str
    second: str
    subject: str
    without: str = ""
    given: str = ""


def contrasts_of(result: StudyResult) -> list[Contrast]:
    """In each recipe the first start against every other one; of each start, self-training against none; and both together
    against neither."""
    arms = {result.side(arm): arm for arm in result.arms}
    starts, recipes = ([*dict.fromkeys(column)] for column in zip(*arms))
    first, *others = starts
    found = []
    for recipe in recipes:
        given = " and unlabeled images" if recipe == SEMI else ""
        subject = "pre-training" if first == PRETRAINED else first
        for other in others:
            without = "pre-training" if (first, other) == (PRETRAINED, SCRATCH) else ""
            found.append(Contrast(arms[first, recipe], arms[other, recipe], subject, without, given))  # type: ignore[index]
    if recipes == [PLAIN, SEMI]:
        for start in starts:
            pair = arms[start, SEMI], arms[start, PLAIN]  # type: ignore[index]
            given = " and pre-training" if start == PRETRAINED else ""
            found.append(Contrast(*pair, "self-training", "unlabeled images", given))
        if first == PRETRAINED and SCRATCH in others:
            pair = arms[first, SEMI], arms[SCRATCH, PLAIN]  # type: ignore[index]
            found.append(Contrast(*pair, "pre-training with self-training", "either"))
    return found
