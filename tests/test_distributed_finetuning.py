"""Fine-tuning by two processes equals one: averaged weights, frozen stages, balanced order and export; boxes, whose losses
are divided by what all processes find in a step."""

import csv

import pytest
import torch
from box_files import CLASSES, Scene, write_coco
from fork_server import finish
from mask_files import draw_scenes, write_scenes
from safetensors.torch import load_file

RUN = (
    "--labels-per-class=4",
    "--steps=6",
    "--batch-size=20",
    "--validations=2",
    "--precision=32-true",
    "--workers=0",
    "--trainer.accelerator=cpu",
    "--optim.ema=0.8",
    "--optim.lr=0.05",
    "--train-stages=1",
    "--data.erasing=0.5",
    "--data.balance=sampling",
)
DETECTION = (
    "--steps=4",
    "--batch-size=8",
    "--validations=1",
    "--precision=32-true",
    "--workers=0",
    "--trainer.accelerator=cpu",
    "--optim.lr=0.5",
    "--head.width=16",
    "--head.convolutions=1",
)
CANCELED = "norms.0.bias"  # the same for all pixels of a channel, and so nothing to the norm after the next convolution
SCENES = (
    "--labels=8",
    "--steps=6",
    "--batch-size=4",
    "--validations=1",
    "--precision=32-true",
    "--workers=0",
    "--trainer.accelerator=cpu",
    "--optim.lr=0.1",  # at 0.5 rounding alone, of a processor without AVX-512, grew to 1.6e-4 in six steps
    "--optim.ema=0.8",
    "--head.width=16",
    "--head.norm=image",
    "--head.dropout=0",
    "--encoder.drop_path_rate=0",
    "--self-training.start=0.2",
    "--self-training.cutmix=0.8",
)


@pytest.fixture(scope="module")
def start(fork_server, digits, encoder_folder):
    """start(out, strategy, …): the processes of a run; one without a strategy, else two."""

    def start(out, strategy, *more):
        words = ["finetune", "classification", "--init", encoder_folder, "--data", digits.labeled, "--out", out, *RUN, *more]
        if strategy is None:
            return [fork_server.start(*words, "--devices=1")]
        return fork_server.start_pair(*words, "--devices=2", f"--trainer.strategy={strategy}")

    return start


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    finish(start(run, None))
    return run


@pytest.mark.two_processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(start, alone, tmp_path, strategy):
    run = tmp_path / "run"
    finish(start(run, strategy))
    ours, theirs = (torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (run, alone))
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=1e-5)
    averages = [end["callbacks"]["AverageWeights"]["average"] for end in (ours, theirs)]
    torch.testing.assert_close(*averages, rtol=0, atol=1e-5)
    assert not any(name.startswith("encoder.layers.0") for name in averages[0]), "frozen parameters are not averaged"
    for name in ("encoder.safetensors", "head.safetensors"):
        pair = [load_file(path / "encoder" / name) for path in (run, alone)]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-5)
    assert (run / "classes.csv").read_text() == (alone / "classes.csv").read_text()


@pytest.fixture(scope="module")
def start_self_training(start, digits):
    """start_self_training(out, strategy): as `start`, with unlabeled images."""
    more = (f"--unlabeled={digits.unlabeled}", "--self-training.ratio=2", "--self-training.start=0.2")
    return lambda out, strategy: start(out, strategy, *more)


@pytest.fixture(scope="module")
def self_trained_alone(start_self_training, tmp_path_factory):
    run = tmp_path_factory.mktemp("self-trained") / "run"
    finish(start_self_training(run, None))
    return run


@pytest.mark.two_processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_self_training_by_two_processes_equals_one(start_self_training, self_trained_alone, tmp_path, strategy):
    """Teacher, running means and counts too, which are over all unlabeled images of a step."""
    runs = tmp_path / "run", self_trained_alone
    finish(start_self_training(runs[0], strategy))
    ours, theirs = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in runs)
    assert theirs["state_dict"]["labeler.num_batches"] == 5
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=1e-5)
    averages = [end["callbacks"]["AverageWeights"]["average"] for end in (ours, theirs)]
    torch.testing.assert_close(*averages, rtol=0, atol=1e-5)
    first, second = ((run / "pseudo-labels.csv").read_text() for run in runs)
    assert first == second and first.count("\n") > 2


@pytest.mark.two_processes
def test_pseudo_masks_by_two_processes_equal_one(fork_server, scene_folder, encoder_folder, tmp_path):
    """With other numbers of pixels inside of the crops on each; pasted boxes, running means and counts too."""
    words = ["finetune", "segmentation", "--init", encoder_folder, "--data", scene_folder, *SCENES]
    words += ["--unlabeled", scene_folder / "train/images"]
    finish([fork_server.start(*words, "--out", tmp_path / "alone", "--devices=1")])
    finish(fork_server.start_pair(*words, "--out", tmp_path / "pair", "--devices=2", "--trainer.strategy=ddp"))
    ours, theirs = (torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("pair", "alone"))
    assert theirs["state_dict"]["labeler.num_batches"] == 5 and theirs["state_dict"]["counts"].sum() == 0, "all reported"
    states = [without_canceled(end["state_dict"]) for end in (ours, theirs)]
    different = [name for name, value in states[0].items() if not torch.allclose(value, states[1][name], rtol=0, atol=1e-5)]
    assert not different
    averages = [without_canceled(end["callbacks"]["AverageWeights"]["average"]) for end in (ours, theirs)]
    torch.testing.assert_close(*averages, rtol=0, atol=1e-5)
    first, second = ((tmp_path / name / "pseudo-labels.csv").read_text() for name in ("pair", "alone"))
    assert first == second and first.count("\n") == 6


def without_canceled(state):
    """Without what a norm of the head cancels: its gradient is nothing but rounding, which Adam scales to a step."""
    return {name: value for name, value in state.items() if not name.endswith(CANCELED)}


@pytest.mark.two_processes
def test_detection_by_two_processes_equals_one(fork_server, encoder_folder, tmp_path):
    """With other numbers of objects on each, and parts that are accumulated."""
    for part, count in (("train", 9), ("val", 5)):
        objects = tuple((CLASSES[number % 2], 2 + 9 * number, 4, 10 + 9 * number, 20) for number in range(4))
        scenes = [Scene(f"{part}-{number}", (40, 40), objects[: 1 + number % 4]) for number in range(count)]
        write_coco(tmp_path / "boxes", scenes, f"images/{part}", f"annotations/{part}.json")
    words = ["finetune", "detection", "--init", encoder_folder, "--data", tmp_path / "boxes", *DETECTION]
    finish([fork_server.start(*words, "--out", tmp_path / "alone", "--devices=1", "--optim.accumulate=1")])
    pair = (*words, "--out", tmp_path / "pair", "--devices=2", "--optim.accumulate=2", "--trainer.strategy=ddp")
    finish(fork_server.start_pair(*pair))
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for name in ("pair", "alone")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    ours, theirs = (list(csv.reader((tmp_path / name / "ap.csv").open())) for name in ("pair", "alone"))
    assert [row[0] for row in ours] == ["class", *CLASSES] and [row[4] for row in ours[1:]] == ["7", "4"]
    for row, other in zip(ours[1:], theirs[1:]):
        assert list(map(float, row[1:])) == pytest.approx(list(map(float, other[1:])), abs=0.01)


@pytest.mark.two_processes
def test_masks_by_two_processes_equal_one(fork_server, encoder_folder, tmp_path):
    """Learned and judged, with parts that are accumulated."""
    for part, count in (("train", 9), ("val", 5)):
        write_scenes(tmp_path / "masks", draw_scenes(count, count, (40, 40)), part)
    words = ["finetune", "detection", "--init", encoder_folder, "--data", tmp_path / "masks", *DETECTION]
    finish([fork_server.start(*words, "--out", tmp_path / "alone", "--devices=1", "--optim.accumulate=1")])
    pair = (*words, "--out", tmp_path / "pair", "--devices=2", "--optim.accumulate=2", "--trainer.strategy=ddp")
    finish(fork_server.start_pair(*pair))
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for name in ("pair", "alone")
    )
    assert any("head.masks" in name for name in ours)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    ours, theirs = (list(csv.reader((tmp_path / name / "mask-ap.csv").open())) for name in ("pair", "alone"))
    assert [row[4] for row in ours[1:]] == [row[4] for row in theirs[1:]] and sum(int(row[4]) for row in ours[1:]) == 7
    for row, other in zip(ours[1:], theirs[1:]):
        assert list(map(float, row[1:])) == pytest.approx(list(map(float, other[1:])), abs=0.01)
