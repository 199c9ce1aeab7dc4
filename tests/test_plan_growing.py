"""Plans of runs whose images grow: each size as a run at that size, options that fit all, and the times that follow."""

from dataclasses import replace

import pytest

from simmim.cli import main
from simmim.planning.growing import plan_growing
from simmim.planning.plan import GIB, USABLE_SHARE, plan_for
from simmim.planning.report import Rates, render, render_growing
from simmim.pretrain import DataSettings, PretrainSettings, preparation
from simmim.pretrain.image_sizes import at_sizes

SIZES = (96, 128, 192)


@pytest.mark.parametrize("more", [{}, {"method": "canvas"}, {"devices": 2, "strategy": "fsdp"}])
def test_each_size_is_planned_as_a_run_at_that_size(more):
    growing = plan_growing("tiny", SIZES, (0.5, 0.3, 0.2), **more)
    alone = [plan_for("tiny", size, **more) for size in SIZES]
    assert [stage.plan.config.window_size for stage in growing.stages] == [6, 8, 12]
    for stage, one in zip(growing.stages, alone, strict=True):
        assert replace(stage.plan, largest_batch=0) == replace(one, largest_batch=0)
        assert stage.plan.largest_batch == alone[-1].largest_batch < alone[0].largest_batch, "it fits at every size"
    flops = [one.training_flops for one in alone]
    assert growing.training_flops == pytest.approx(0.5 * flops[0] + 0.3 * flops[1] + 0.2 * flops[2])
    assert growing.relative_flops == pytest.approx(growing.training_flops / flops[2]) and growing.largest.image_size == (
        192,
        192,
    )


def test_the_figure_of_the_docs():
    assert f"{plan_growing('tiny', SIZES).relative_flops:.2f}" == "0.55"


@pytest.mark.parametrize("preset", ["nano", "swin-nano", "vit-nano"])
@pytest.mark.parametrize("method, model", [("simmim", {}), ("canvas", {}), ("canvas", {"mask_unit": 16})])
def test_sizes_are_resolved_as_by_pretraining(digits, tmp_path, preset, method, model):
    """Windows, tables of the last size, mask units, decoder, and the default batch."""
    if preset == "vit-nano" and method == "canvas":
        pytest.skip("no canvases")
    data = DataSettings(str(digits.unlabeled))
    given = {"method": method, "preset": preset, "image_sizes": (32, 64), "model": model, "workers": 0}
    settings = preparation.resolve_run(PretrainSettings(data=data, out=str(tmp_path / "run"), **given)).settings
    planned = plan_growing(preset, (32, 64), method=method, model=model, encoder={"in_channels": 1})
    for stage, part in zip(planned.stages, at_sizes(settings), strict=True):
        config = part.encoder_config()
        assert {name: getattr(stage.plan.config, name) for name in config.changeable_fields} == {
            name: getattr(config, name) for name in config.changeable_fields
        }
        assert replace(stage.settings, encoder={}) == replace(part.model, encoder={}) and stage.plan.image_size == part.size


def test_options_fit_at_every_size():
    """As memory shrinks the largest size decides; and a small one with larger windows, should there be one."""
    found = []
    for gib in (20, 9, 3):
        growing = plan_growing("tiny", SIZES, device_memory_gib=gib)
        setup = growing.largest.recommended
        assert {stage.plan.recommended for stage in growing.stages} == {setup}
        assert all(stage.plan.recommended_memory.peak <= gib * USABLE_SHARE * GIB for stage in growing.stages)
        found.append((setup.checkpoint_activations, setup.sequential_attention is not None))
    assert found == [(False, False), (True, False), (True, True)]
    assert plan_growing("giant-3b", SIZES, device_memory_gib=16).largest.recommended is None


def test_times_follow_from_a_rate():
    """4.1 GFLOP at 2 × 10 TFLOP/s: 1 million images in 205 s, each size by its share of the FLOPs."""
    growing = plan_growing("tiny", SIZES, method="canvas", devices=2)
    assert growing.training_flops / 1e9 == pytest.approx(4.1, abs=0.05)
    text = render_growing(growing, Rates(10, 10**6)).splitlines()
    assert text[0].startswith("tiny, images of 96, 128, 192 px in one run, window 12")
    assert f"{2e13 / growing.training_flops:,.0f} images/s at 10 TFLOP/s on each device, 1,000,000 images in 3 min" in text
    rows = [line.split() for line in text if line.startswith(("96 px", "128 px", "192 px"))]
    shares = [stage.share * stage.plan.training_flops / growing.training_flops for stage in growing.stages]
    seconds = 1e6 * growing.training_flops / 2e13
    assert [row[5] for row in rows] == [f"{share:.0%}" for share in shares] and rows[0][7] == f"{shares[0] * seconds:.0f}"
    assert " ".join(rows[2]).endswith("window 12, mask unit 32 px") and max(map(len, text)) <= 120
    one = plan_for("tiny", 192)
    assert f"{1e14 / one.training_flops:,.0f} images/s at 100 TFLOP/s on each device" in render(one, Rates(100))
    assert "images/s" not in render(one)


def test_by_the_command(capsys):
    assert main(["plan", "--preset", "tiny", "--image_sizes", "[96,128,192]", "--device_memory_gib", "9"]) == 0
    said = capsys.readouterr().out
    assert (
        "the mean of the run: 0.55 of those of 192 px throughout" in said and "To fit, use checkpoint_activations." in said
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "give --image, or --image_sizes for images that grow in the course of the run, and not both"),
        (("--image=192", "--image_sizes=[96,192]"), "and not both"),
        (("--image=192", "--image_size_shares=[1]"), "image_size_shares needs sizes that follow one another"),
        (("--image_sizes=[192,96]",), "image_sizes has 96 px after 192 px: give growing sizes"),
        (("--image_sizes=[96]",), "give two sizes or more"),
        (
            ("--image_sizes=[96,192]", "--image_size_shares=[0.5,0.6]"),
            "with the sum 1.1: give positive shares that sum to 1",
        ),
        (("--image_sizes=[96,192]", "--image_size_shares=[1]"), "image_size_shares has 1 entries and image_sizes has 2"),
        (("--image_sizes=[96,192]", "--image_size_shares=[]"), "image_size_shares has 0 entries and image_sizes has 2"),
        (("--image_sizes=[97,192]",), "at 97 px of image_sizes: no mask unit fits images of 97×97 px"),
        (("--image_sizes=[48,192]", "--method=canvas", "--model.share=5"), "at 48 px of image_sizes: "),
        (("--image_sizes=[96,192]", "--model.mask_ratio=2"), "at 96 px of image_sizes: mask ratio is 2"),
        (("--image=192", "--tflops=0"), "tflops is 0: give a positive number"),
        (("--image=192", "--images_seen=1000"), "images_seen needs a rate for their time: give tflops"),
        (("--image=192", "--images_seen=0", "--tflops=1"), "images_seen is 0: give a positive number"),
    ],
)
def test_wrong_input(words, message, capsys):
    """One line, exit code 2."""
    assert main(["plan", "--preset", "tiny", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
