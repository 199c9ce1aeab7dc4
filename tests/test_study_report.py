"""What a study reports: statistics against known numbers, the table, sentences and the plot."""

import math

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_rel

from simmim.evaluate.contest import paired_difference
from simmim.evaluate.paired import mean_and_error, t_interval
from simmim.finetune.label_study.chosen_rates import edge_warning
from simmim.finetune.label_study.gains import equivalent_interval, equivalent_labels, paired_gain
from simmim.finetune.label_study.report import comparison_table, gain_sentences, plot, report
from simmim.finetune.label_study.results import Rates, StudyResult, Trial


def trial(arm, labels, seed, accuracy, lr=0.1, loss=1.0, fold=None):
    return Trial(arm, labels, seed, Rates(lr, 0.75), accuracy, loss, fold)


# --- Statistics ------------------------------------------------------------------------------------------------------


def test_mean_and_error():
    """Of 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14, deviation sqrt(14 / 3), error of the mean half of it."""
    mean, error = mean_and_error([1, 2, 3, 6])
    assert mean == 3 and error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert mean_and_error([0.5, 0.5]) == (0.5, 0.0)
    mean, error = mean_and_error([0.25])
    assert mean == 0.25 and math.isnan(error)


def test_an_interval_is_student_s():
    """Of 1, 2, 3, 6 as SciPy has it; 3.182 standard errors for four values."""
    values = [1, 2, 3, 6]
    mean, half = t_interval(values)
    expected = student.interval(0.95, 3, loc=3, scale=math.sqrt(14 / 3) / 2)
    assert (mean - half, mean + half) == pytest.approx(expected)
    assert math.isnan(t_interval([0.25])[1])


def test_comparison_table():
    """5 labels: 60, 70, 80 against 50, 60, 40: gains 10, 10, 40, mean 20, error sqrt(300) / sqrt(3) = 10."""
    accuracies = {
        ("ours", 5): (0.6, 0.7, 0.8),
        ("theirs", 5): (0.5, 0.6, 0.4),
        ("ours", "all"): (0.9, 0.9, 0.9),
        ("theirs", "all"): (0.91, 0.93, 0.92),
    }
    trials = [
        trial(arm, labels, seed, accuracy)
        for (arm, labels), values in accuracies.items()
        for seed, accuracy in zip((3, 1, 2), values)
    ]
    p = [ttest_rel(accuracies["ours", labels], accuracies["theirs", labels]).pvalue for labels in (5, "all")]
    expected = [
        "| labels per class | ours | theirs | paired gain | seeds |",
        "| ---: | ---: | ---: | ---: | ---: |",
        f"| 5 | 70.0 ± 5.8 | 50.0 ± 5.8 | +20.0 ± 10.0 (p = {p[0]:.2g}) | 3 |",
        f"| all | 90.0 ± 0.0 | 92.0 ± 0.6 | -2.0 ± 0.6 (p = {p[1]:.2g}) | 3 |",
    ]
    assert comparison_table(trials, ("ours", "theirs"), (5, "all")).splitlines() == expected
    assert comparison_table(trials[::-1], ("ours", "theirs"), (5, "all")).splitlines() == expected, "in any order"
    swapped = comparison_table(trials, ("theirs", "ours"), (5, "all")).splitlines()[2]
    assert swapped.split("|")[4].strip().startswith("-20.0 ± 10.0")


def test_pairing_is_by_seed():
    """Two arms that differ by 12.5 points with every seed have an exact gain, however much the seeds differ. A seed that one
    arm alone has does not count."""
    trials = [trial("b", 1, seed, seed / 16) for seed in (5, 1, 3)]
    trials += [trial("a", 1, seed, seed / 16 + 0.125) for seed in (1, 3, 5, 7)]
    gain = paired_gain(trials, "a", "b", 1)
    assert (gain.mean, gain.error, gain.num_seeds) == (12.5, 0.0, 3) and math.isnan(gain.p)


def test_a_draw_is_not_won():
    trials = [trial("a", 1, seed, score) for seed, score in enumerate((0.6, 0.5, 0.4))]
    trials += [trial("b", 1, seed, 0.5) for seed in range(3)]
    assert paired_gain(trials, "a", "b", 1).num_won == 1


def test_p_is_the_paired_t_test_s():
    generator = np.random.default_rng(0)
    ours, theirs = generator.random((2, 7))
    trials = [trial("a", 1, seed, value) for seed, value in enumerate(ours)]
    trials += [trial("b", 1, seed, value) for seed, value in enumerate(theirs)]
    assert paired_gain(trials, "a", "b", 1).p == pytest.approx(ttest_rel(ours, theirs).pvalue, rel=1e-9)


@pytest.mark.parametrize("kind", [float, np.float32])
def test_gains_that_rounding_alone_tells_apart_have_no_p(kind):
    """One image of ten with each of three seeds, as 90 − 80, 80 − 70 and 70 − 60 percent, logged in float32."""
    pairs = [(kind(ours / 10), kind((ours - 1) / 10)) for ours in (9, 8, 7)]
    trials = [trial(arm, 1, seed, float(pair[arm == "b"])) for seed, pair in enumerate(pairs) for arm in "ab"]
    gain = paired_gain(trials, "a", "b", 1)
    assert math.isnan(gain.p) and gain.mean == pytest.approx(10, abs=1e-4)
    difference = paired_difference(*([float(pair[which]) for pair in pairs] for which in range(2)))
    assert math.isnan(difference.p) and difference.cell() == "+10.0 ± 0.0"
    sentence = gain_sentences(StudyResult(("a", "b"), tuple(trials), (), {1: 1}))[0]
    assert sentence.endswith("10.0 ± 0.0 points against b (3 seeds), which may be chance.")


def test_equivalent_labels():
    """Between 10 labels at 60 % and 40 at 80 %, 70 % are half-way by logarithm: 20 labels."""
    trials = [trial("b", 10, 0, 0.6), trial("b", 40, 0, 0.8)]
    places = {10: 10, 40: 40}
    assert equivalent_labels(trials, "b", 70.0, places) == pytest.approx(20)
    assert equivalent_labels(trials, "b", 80.0, places) == pytest.approx(40)
    assert equivalent_labels(trials, "b", 80.1, places) == math.inf
    assert equivalent_labels(trials, "b", 59.0, places) == 0.0
    assert equivalent_labels(trials, "b", 60.0, places) == 10


def result_of(gains, scratch=(0.5, 0.6, 0.7)):
    """A study of 10, 20 and 40 labels with three seeds, whose pre-trained arm has these gains."""
    trials, noise = [], (-0.01, 0.0, 0.01)
    for labels, base, gain in zip((10, 20, 40), scratch, gains):
        for seed in range(3):
            trials.append(trial("from scratch", labels, seed, base + noise[seed]))
            trials.append(trial("pre-trained", labels, seed, base + gain + noise[seed] / 2))
    return StudyResult(("pre-trained", "from scratch"), tuple(trials), (), {10: 10, 20: 20, 40: 40})


def test_sentences():
    sentences = gain_sentences(result_of((0.15, 0.05, 0.001)))
    assert sentences[0].startswith(
        "With 10 labels per class pre-training gains 15.0 ± 1.2 points against training from scratch (p < 0.001, "
    ), "± 0.29 · 4.30"
    # Seed 0 alone needs 20 · 2^0.55 labels, seed 2 alone 20 · 2^0.45; each is 1 of 27 draws.
    needs = ": from scratch needs 28 for the same score."
    assert " over 3 seeds) and saves 18 labels per class (95 % interval 17 to 19)" in sentences[0]
    assert (
        sentences[0].endswith(needs) and sentences[1].endswith(needs) and " and saves 8 labels per class (" in sentences[1]
    )
    assert sentences[2].endswith(", which may be chance.")


def test_sentence_where_the_other_arm_never_reaches_the_score_and_where_it_is_better():
    sentences = gain_sentences(result_of((0.25, -0.1, 0.1)))
    assert sentences[0].endswith(
        "; from scratch does not reach that score with 40: more than 30 labels per class saved (95 % interval over 30)."
    )
    assert "pre-training loses 10.0 ± 1.2 points against training from scratch" in sentences[1]
    assert "saves" not in sentences[1]
    assert sentences[2].endswith("over 3 seeds)."), "no larger number of labels was compared"


def study_of_two_numbers(ours, theirs):
    """A study of 10 and 40 labels: scores of the first arm with 10, and of the other with both, a row per seed."""
    trials = [trial("pre-trained", 10, seed, score) for seed, score in enumerate(ours)]
    trials += [trial("pre-trained", 40, seed, 1.0) for seed in range(len(ours))]
    for seed, scores in enumerate(theirs):
        trials += [trial("from scratch", labels, seed, score) for labels, score in zip((10, 40), scores)]
    return StudyResult(("pre-trained", "from scratch"), tuple(trials), (), {10: 10, 40: 40})


def test_labels_saved_have_an_interval_over_the_seeds():
    """Of two seeds a bootstrap draws one twice in half of the cases, so that the interval is that of the single seeds: 70 %
    between 60 and 80 % are 20 labels, 75 % are 28."""
    result = study_of_two_numbers((0.70, 0.75), [(0.6, 0.8), (0.6, 0.8)])
    assert equivalent_interval(result, 10, "from scratch") == pytest.approx((20, 40 / math.sqrt(2)))
    assert equivalent_interval(result, 10, "from scratch") == equivalent_interval(result, 10, "from scratch")
    never = study_of_two_numbers((0.70, 0.85), [(0.6, 0.8), (0.6, 0.8)])
    assert equivalent_interval(never, 10, "from scratch") == (pytest.approx(20), math.inf)
    worse = study_of_two_numbers((0.50, 0.75), [(0.6, 0.8), (0.6, 0.8)])
    assert equivalent_interval(worse, 10, "from scratch")[0] == 0


def test_seeds_are_drawn_with_all_their_trials():
    """Where both arms move together by 10 points, the labels saved are the same whatever seeds are drawn."""
    result = study_of_two_numbers((0.65, 0.75, 0.55), [(0.6, 0.7), (0.7, 0.8), (0.5, 0.6)])
    assert equivalent_interval(result, 10, "from scratch") == pytest.approx((20, 20))


def test_the_report_shows_rates_intervals_and_choices_on_the_edge():
    """Scores 50 to 70 % of three seeds: 60 ± 4.30 · 10 / √3. One label has the rates of two."""
    rates = {"pre-trained": Rates(1.0, 0.65), "from scratch": Rates(3.0, 1.0)}
    grid = [Rates(factor, decay) for factor in (0.3, 1.0, 3.0) for decay in (0.65, 1.0)]
    tuning = [Trial(arm, 2, 0, tried, 0.5, 1.0, (0, 2)) for arm in rates for tried in grid]
    trials = [
        Trial(arm, labels, seed, rates[arm], 0.5 + seed / 10, 1.0)
        for arm in rates
        for labels in (1, 2, "all")
        for seed in range(3)
    ]
    result = StudyResult(tuple(rates), tuple(trials), tuple(tuning), {1: 1, 2: 2, "all": 7.5}, "40 images of seed 0")
    head, _, one, two, every, *rest = report(result).splitlines()
    assert head.endswith("| seeds | rates pre-trained | rates from scratch |")
    assert one.startswith("| 1 | 60.0 ± 24.8 | 60.0 ± 24.8 |")
    assert one.endswith("| lr × 1, decay 0.65 (as at 2) | lr × 3, decay 1 (as at 2) |")
    assert two.endswith("| 3 | lr × 1, decay 0.65 | lr × 3, decay 1 |")
    assert every.endswith("| lr × 1, decay 0.65 (not tuned) | lr × 3, decay 1 (not tuned) |")
    explained, (warning,) = "\n".join(rest), [line for line in rest if line.startswith("Warning")]
    assert "Judged by 40 images of seed 0" in explained and "95 % interval of the mean over seeds" in explained
    assert "with all labels: initial weights and order alone" in explained
    assert (
        "the highest learning-rate factor (3) was chosen by from scratch at 2:" in warning and "pre-trained" not in warning
    )


def test_both_ends_of_the_grid_are_edges():
    """Of the learning rate the lowest and the highest factor; of layer decays the lowest of three or more."""

    def warning(factors, decays, chosen):
        grid = [Rates(factor, decay) for factor in factors for decay in decays]
        tuning = tuple(Trial("a", 2, 0, tried, 0.5, 1.0, (0, 2)) for tried in grid)
        trials = tuple(Trial(arm, 2, 0, chosen, 0.5, 1.0) for arm in "ab")
        return edge_warning(StudyResult(("a", "b"), trials, tuning, {2: 2}))

    factors, decays = (3.0, 0.3, 1.0), (0.9, 0.65, 1.0)
    end = ": on the edge of the grid, beyond it a better one may lie. Widen lr_factors, layer_decays."
    low, decay = (
        "the lowest learning-rate factor (0.3) was chosen by a at 2",
        "the lowest layer decay (0.65) was chosen by a at 2",
    )
    assert warning(factors, decays, Rates(0.3, 0.9)) == f"Warning: {low}{end}"
    assert warning(factors, decays, Rates(0.3, 0.65)) == f"Warning: {low}; {decay}{end}"
    assert "the highest learning-rate factor (3) was" in warning(factors, decays, Rates(3.0, 1.0))
    assert warning(factors, decays, Rates(1.0, 1.0)) == warning(factors, (0.65, 1.0), Rates(1.0, 0.65)) == ""
    assert warning((0.3,), decays, Rates(0.3, 1.0)) == "", "a single rate is no choice"


def test_the_plot_shows_every_number():
    result = result_of((0.1, 0.1, 0.1))
    axes = plot(result, "digits").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "20", "40"]
    means = axes.containers[0].lines[0].get_ydata()
    assert list(means) == pytest.approx([60, 70, 80]) and axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pre-trained", "from scratch"]
    assert "95 %" in axes.get_legend().get_title().get_text()
    (bars,) = axes.containers[0].lines[2]
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(0.5 / math.sqrt(3) * student.ppf(0.975, 2)), "of 59.5, 60 and 60.5"
