"""Makes the other files of this folder: images, and runs and exports as version 0.1.0 wrote them.

Made with version 0.1.0, the commit before d81f244, and PyTorch 2.13.0 on a CPU. Later versions cannot run this script: its
imports are those of 0.1.0. To make everything anew, check out that commit elsewhere and run, in this folder:

    PYTHONPATH=CHECKOUT OMP_NUM_THREADS=1 python make.py

Paths are relative to this folder, so that a copy of it anywhere can be resumed.
"""
from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
SIDE = 32
CLASSES = ("cross", "disk")

# Two stages of one block and one head each, with few channels, keep the files small. Most of the weights are those of the
# position-bias MLPs, which have 512 hidden units whatever the encoder.
ENCODER = (
    "--model.encoder.embed_dim=4", "--model.encoder.depths=[1,1]", "--model.encoder.num_heads=[1,1]",
    "--model.encoder.window_size=4", "--model.encoder.mlp_ratio=2.0",
)  # fmt: skip
# A GPU would sum in another order, and choose another precision.
MACHINE = ("--workers=0", "--trainer.accelerator=cpu", "--precision=32-true", "--log-every-steps=1")
# The learning rate is per 512 images: 0.64 is 5e-3 at a batch of 4, enough for every step to change the weights.
PRETRAIN = (
    "pretrain", "--data=images", "--preset=nano", "--image-size=32", "--model.mask_unit=8", *ENCODER, "--epochs=4",
    "--batch-size=4", "--seed=1", "--optim.lr=0.64", "--optim.warmup_epochs=1", *MACHINE,
)  # fmt: skip
# The jitter is not the default, so that the old spelling of its name matters.
CLASSIFY = (
    "finetune", "classification", "--init=encoder", "--data=labeled", "--batch-size=4", "--seed=1", "--optim.lr=2.56",
    "--data.colour_jitter=0.3", *MACHINE,
)  # fmt: skip
# One validation, at the end: the model that is kept is the last one, whatever its accuracy.
CLASSIFIER = (*CLASSIFY, "--epochs=4", "--validations=1", "--optim.ema=0")
# All validation images are classified correctly from the first validation on. Nothing is better than that: patience ends the
# run after ten steps, and the model of the second step stays the best. The last stage alone is trained, which keeps the
# checkpoint small.
INTERRUPTED = (
    *CLASSIFY, "--train-stages=1", "--epochs=16", "--validations=16", "--optim.ema=0.8", "--patience=4",
)  # fmt: skip
SEGMENTER = (
    "finetune", "segmentation", "--init=encoder", "--data=scenes", "--batch-size=4", "--seed=1", "--optim.lr=2.56",
    "--data.colour_jitter=0.2", "--head.width=16", "--head.norm=batch", "--epochs=40", "--validations=1", "--optim.ema=0",
    *MACHINE,
)  # fmt: skip
PRETRAIN_STOP, CLASSIFIER_STOP = 7, 7  # steps
NON_FINITE_STEP = 3


# --- Images ------------------------------------------------------------------------------------------------------------


def draw_images() -> None:
    """Folders images, labeled and scenes."""
    generator = np.random.default_rng(0)
    for number in range(12):
        save_image(Path("images") / f"{number:02d}.png", drawn(generator, CLASSES[number % 2])[0])
    for part in ("train", "val"):
        for name in CLASSES:
            for number in range(4):
                save_image(Path("labeled") / part / name / f"{number}.png", drawn(generator, name)[0])
    for part, count in (("train", 4), ("val", 2)):
        for number in range(count):
            image, mask = drawn(generator, CLASSES[number % 2])
            save_image(Path("scenes") / part / "images" / f"{number}.png", image)
            save_image(Path("scenes") / part / "masks" / f"{number}.png", mask)
    Path("scenes", "classes.txt").write_text("background\ncross\ndisk\n", encoding="utf-8")


def drawn(generator: np.random.Generator, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A white disk on a gray ramp or a gray cross on a dark one, and its mask: two arrays (SIDE, SIDE) of uint8."""
    y, x = np.mgrid[:SIDE, :SIDE]
    center_y, center_x = generator.integers(10, SIDE - 10, size=2)
    size = generator.integers(9, 13) if name == "disk" else generator.integers(6, 10)
    dy, dx = np.abs(y - center_y), np.abs(x - center_x)
    disk, cross = dy**2 + dx**2 <= size**2, (np.minimum(dy, dx) <= 1) & (np.maximum(dy, dx) <= size)
    inside = disk if name == "disk" else cross
    image = generator.integers(10, 40) + x + y // 2 + (80 if name == "disk" else 0)
    image[inside] = generator.integers(220, 250) if name == "disk" else generator.integers(130, 160)
    return image.astype(np.uint8), np.where(inside, 1 + CLASSES.index(name), 0).astype(np.uint8)


def save_image(path: Path, values: np.ndarray) -> None:
    """A gray PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, optimize=True)


# --- Runs --------------------------------------------------------------------------------------------------------------


def simmim(*words: str, code: int = 0) -> None:
    """Run one command, which must end with `code`."""
    from simmim.cli import main

    print(f"$ simmim {' '.join(words)}", flush=True)
    found = main(list(words))
    assert found == code, f"exit code {found}, expected {code}"


@contextlib.contextmanager
def stopped_after(step: int):
    """A context in which a run is sent SIGTERM at the end of that step: it saves and ends with code 143."""
    from simmim.training import SaveRun

    end_of_batch = SaveRun.on_train_batch_end

    def stop(self, trainer, *rest) -> None:
        end_of_batch(self, trainer, *rest)
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(SaveRun, "on_train_batch_end", stop):
        yield


@contextlib.contextmanager
def one_step_not_finite():
    """A context in which the loss of one pre-training step is not a number, so that checkpoints count a skipped step."""
    from pretrain.module import SimMIMPretraining

    training_step = SimMIMPretraining.training_step

    def step(self, batch, batch_idx):
        loss = training_step(self, batch, batch_idx)
        return loss * math.nan if self.trainer.global_step == NON_FINITE_STEP else loss

    with mock.patch.object(SimMIMPretraining, "training_step", step):
        yield


def keep(run: Path, *names: str) -> None:
    """Delete all of a run folder except these files and folders."""
    wanted = [run / name for name in names]
    for path in sorted(run.rglob("*"), reverse=True):
        if any(path == name or name in path.parents or path in name.parents for name in wanted):
            continue
        path.rmdir() if path.is_dir() else path.unlink()


def without_folder(file: Path) -> None:
    """Make the paths of images in a text file relative to the current folder; runs write them absolute."""
    file.write_text(file.read_text(encoding="utf-8").replace(f"{Path.cwd()}{os.sep}", ""), encoding="utf-8")


def last_checkpoint(run: Path) -> dict:
    """The content of a run's newest checkpoint."""
    return torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)


def exported(run: Path) -> dict[str, torch.Tensor]:
    """Encoder, mask token and decoder, or encoder and head, as a run exported them."""
    folder = run / "encoder"
    state = {f"encoder.{name}": value for name, value in load_file(folder / "encoder.safetensors").items()}
    if (folder / "pretraining.safetensors").is_file():
        state |= load_file(folder / "pretraining.safetensors")
    if (folder / "head.safetensors").is_file():
        state |= {f"head.{name}": value for name, value in load_file(folder / "head.safetensors").items()}
    return state


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def make_pretraining(scratch: Path) -> None:
    """pretrain, pretrain-finished.safetensors and encoder."""
    with one_step_not_finite():
        simmim(*PRETRAIN, f"--out={scratch / 'whole'}")
        with stopped_after(PRETRAIN_STOP):
            simmim(*PRETRAIN, "--out=pretrain", code=143)
    keep(Path("pretrain"), "config.yaml", "checkpoints/last.ckpt", "encoder", "metrics.csv", "non-finite-steps.txt")
    without_folder(Path("pretrain") / "non-finite-steps.txt")
    finished = exported(scratch / "whole")
    save_file(finished, "pretrain-finished.safetensors")
    assert all((finished[name] != value).any() for name, value in exported(Path("pretrain")).items())
    simmim("export", f"--run={scratch / 'whole'}", "--format=safetensors", "--out=encoder")


def make_features() -> None:
    """features.safetensors: normalized images, pooled features and the map of every stage."""
    from simmim.convert import read_encoder

    saved = read_encoder("encoder")
    pixels = [np.asarray(Image.open(f"images/{number:02d}.png")) for number in (0, 1)]
    images = torch.from_numpy(np.stack(pixels))[:, None].float() / 255
    # 24 px high: the map of 6 rows does not divide into windows of 4 and is padded.
    images = ((images - saved.preprocessing.mean[0]) / saved.preprocessing.std[0])[:, :, :24].contiguous()
    with torch.no_grad():
        output = saved.encoder(images, return_stages=True)
    stages = {f"stages.{number}": stage.contiguous() for number, stage in enumerate(output.stages)}
    save_file({"images": images, "pooled": output.pooled, **stages}, "features.safetensors")


def make_classifiers(scratch: Path) -> None:
    """classifier, classifier-predictions.csv, classifier-interrupted and classifier-finished.safetensors."""
    simmim(*CLASSIFIER, "--out=classifier")
    keep(Path("classifier"), "config.yaml", "encoder")
    simmim("predict", "--run=classifier", "--images=images", "--out=classifier-predictions.csv", "--workers=0")
    without_folder(Path("classifier-predictions.csv"))

    simmim(*INTERRUPTED, f"--out={scratch / 'whole-classifier'}")
    with stopped_after(CLASSIFIER_STOP):
        simmim(*INTERRUPTED, "--out=classifier-interrupted", code=143)
    keep(Path("classifier-interrupted"), "config.yaml", "checkpoints/last.ckpt", "encoder", "metrics.csv")
    end, stopped = (last_checkpoint(run) for run in (scratch / "whole-classifier", Path("classifier-interrupted")))
    assert stopped["callbacks"]["StopEarly"]["without"] == 2, "patience has nothing to count on from"
    assert stopped["callbacks"]["KeepBest"]["value"] == 1.0, "a better model may come after the interruption"
    # The average depends on the weights of every step, which are therefore not stored as well.
    average = end["callbacks"]["AverageWeights"]["average"]
    assert all((stopped["callbacks"]["AverageWeights"]["average"][name] != value).any() for name, value in average.items())
    save_file({"step": torch.tensor(end["global_step"]), **average}, "classifier-finished.safetensors")
    assert same(exported(scratch / "whole-classifier"), exported(Path("classifier-interrupted")))


def make_segmenter() -> None:
    """segmenter and segmenter-logits.safetensors."""
    from finetune import load_segmenter

    simmim(*SEGMENTER, "--out=segmenter")
    keep(Path("segmenter"), "config.yaml", "encoder")
    # Half the height is less than the size of training: the model fills the image up.
    image = torch.from_numpy(np.asarray(Image.open("scenes/val/images/1.png"))[: SIDE // 2].copy())[None, None]
    logits = load_segmenter("segmenter").logits(image).contiguous()
    save_file({"image": image, "logits": logits}, "segmenter-logits.safetensors")


def check_resuming(scratch: Path) -> None:
    """In a copy of the current folder, resumed runs must end bit for bit as those that were not interrupted."""
    copy = scratch / "copy"
    shutil.copytree(Path.cwd(), copy)
    os.chdir(copy)
    simmim("pretrain", "--out=pretrain", "--resume")
    assert same(exported(copy / "pretrain"), load_file("pretrain-finished.safetensors"))
    simmim("finetune", "classification", "--out=classifier-interrupted", "--resume")
    ends = [last_checkpoint(scratch / "whole-classifier"), last_checkpoint(copy / "classifier-interrupted")]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    assert same(*(end["state_dict"] for end in ends))
    assert same(*(end["callbacks"]["AverageWeights"]["average"] for end in ends))
    assert same(exported(scratch / "whole-classifier"), exported(copy / "classifier-interrupted"))


def main() -> None:
    """Make everything in a temporary folder, and put it beside this file once all is made and checked."""
    # The lines of PyTorch, and not the kernels that are compiled for the processor at hand.
    os.environ["SIMMIM_KERNELS"] = "0"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch, made = Path(name).resolve(), Path(name).resolve() / "made"
        made.mkdir()
        os.chdir(made)
        draw_images()
        make_pretraining(scratch)
        make_features()
        make_classifiers(scratch)
        make_segmenter()
        check_resuming(scratch)
        os.chdir(HERE)
        for path in made.iterdir():
            if path.is_dir():
                shutil.rmtree(HERE / path.name, ignore_errors=True)
                shutil.copytree(path, HERE / path.name)
            else:
                shutil.copyfile(path, HERE / path.name)


if __name__ == "__main__":
    main()
