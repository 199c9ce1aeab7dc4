"""Which rates each arm of a study chose, and whether a choice sits on the grid's edge."""

from __future__ import annotations

from simmim.finetune.label_study.results import Rates, StudyResult

Choice = tuple[str, int | str]  # arm and labels


def grids(result: StudyResult) -> dict[Choice, set[Rates]]:
    """The rates that were tried, by the choices that were made by cross-validation."""
    tried: dict[Choice, set[Rates]] = {}
    for trial in result.tuning:
        tried.setdefault((trial.arm, trial.labels), set()).add(trial.rates)
    return tried


def chosen_rates(result: StudyResult) -> dict[Choice, Rates]:
    """The rates of the judged trials, which are the same for all seeds; of arms that have chosen for others too."""
    chosen = {(trial.arm, trial.labels): trial.rates for trial in result.trials}
    lent = {(result.rates_of.get(arm, arm), labels): rates for (arm, labels), rates in chosen.items()}
    return {**lent, **chosen}


def rates_cells(result: StudyResult) -> dict[Choice, str]:
    """The rates as cells of a table; where a choice was not tuned itself, whose it is."""
    chosen, tuned = chosen_rates(result), grids(result)
    cells = {}
    for (arm, labels), rates in chosen.items():
        chooser = result.rates_of.get(arm, arm)
        at = [
            value for value in result.labels if (chooser, value) in tuned and result.labels[value] >= result.labels[labels]
        ]
        lender = [chooser] * (chooser != arm) + [f"at {value}" for value in at[:1] if value != labels]
        origin = f" (as {' '.join(lender)})" if lender else ""
        if tuned and not at:
            origin = " (not tuned)"
        cells[arm, labels] = rates.describe() + origin
    return cells


def edge_warning(result: StudyResult) -> str:
    """One line that names the choices at the end of what was tried, beyond which a better rate may lie; empty for none.

    A layer decay of 1 is the end of its range, and of two values neither lies inside: only the lowest of three or more is an
    edge.
    """
    edges: dict[str, list[str]] = {}
    chosen = chosen_rates(result)
    for (arm, labels), grid in grids(result).items():
        rates = chosen.get((arm, labels))
        if rates is None:
            continue
        where = f"{arm} at {labels}"
        factors = sorted({tried.lr_factor for tried in grid})
        if len(factors) > 1 and rates.lr_factor in (factors[0], factors[-1]):
            end = "lowest" if rates.lr_factor == factors[0] else "highest"
            edges.setdefault(f"the {end} learning-rate factor ({rates.lr_factor:g})", []).append(where)
        decays = sorted({float(tried.layer_decay) for tried in grid if tried.layer_decay is not None})
        if len(decays) > 2 and rates.layer_decay == decays[0]:
            edges.setdefault(f"the lowest layer decay ({decays[0]:g})", []).append(where)
    if not edges:
        return ""
    choices = "; ".join(f"{end} was chosen by {', '.join(places)}" for end, places in edges.items())
    return f"Warning: {choices}: on the edge of the grid, beyond it a better one may lie. Widen lr_factors, layer_decays."
