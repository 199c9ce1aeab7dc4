"""What stage 1 shows while it runs: a fixed set of images, reconstructed again and again, and what its features are worth on
labeled images."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import ImageSamples, collate, open_labeled_source
from simmim.encoders.base import EncoderConfig
from simmim.evaluate import (
    Embeddings,
    EncoderPass,
    FeatureScore,
    Pixels,
    ViewBatch,
    all_features,
    check_any_readable,
    check_scikit_learn,
    collect_embeddings,
    draw_labels,
    encode_views,
    load_views,
    pool_draws,
    record_unreadable,
    score_features,
)
from simmim.pretrain.module import PretrainingModule
from simmim.pretrain.reconstruction_grid import COLUMNS, reconstruction_grid
from simmim.pretrain.settings import ProbeSettings
from simmim.training.loggers import log_picture
from simmim.training.progress import Throughput

KEEP_VIEWS_MIB = 512  # labeled images that take less stay in memory as the encoder sees them, and are read once


class Reconstructions(pl.Callback):
    """A grid of original, masked, prediction pasted into the mask, and full prediction, of the same images and masks
    each time, to RUN/reconstructions and to the loggers that show pictures.

    Args:
        samples: evaluation views of the images; the first `count` that can be read, evenly spread, are shown.
    """

    def __init__(self, samples: ImageSamples, run: Path, every_steps: int, count: int = 8) -> None:
        self.folder, self.every_steps = run / "reconstructions", every_steps
        rows = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))
        self.batch = collate([samples[0, int(row)] for row in rows])
        self.step = 0  # of the last picture; batches that are accumulated in one step end at the same one

    def on_train_batch_end(self, trainer: pl.Trainer, module: PretrainingModule, *_) -> None:
        """Draw at every `every_steps`-th step."""
        if trainer.global_step % self.every_steps == 0 and trainer.global_step != self.step:
            self.draw(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: PretrainingModule) -> None:
        """Draw the end."""
        if trainer.global_step % self.every_steps:
            self.draw(trainer, module)

    def draw(self, trainer: pl.Trainer, module: PretrainingModule) -> None:
        """Write one picture. A model that is divided among processes computes only when all of them do."""
        self.step = trainer.global_step
        if not trainer.is_global_zero and module.device_mesh is None:
            return
        model, training = module.model, module.model.training
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model.eval()
            images, drawn = module.inputs({**self.batch, "image": self.batch["image"].to(module.device)})
            mask, prediction = model.reconstruct(images, drawn)
            model.train(training)
        if not trainer.is_global_zero:
            return
        picture = reconstruction_grid(images, mask, prediction, module.mean, module.std, across=2 if len(images) > 4 else 1)
        self.folder.mkdir(exist_ok=True)
        picture.save(self.folder / f"step-{trainer.global_step:07d}.png")
        # Scalars of the n-th step stand at n - 1. There, a picture from right before a checkpoint is not taken back when the
        # run resumes at n, where it would not be drawn again.
        log_picture(trainer.loggers, "reconstructions", picture, trainer.global_step - 1, ", ".join(COLUMNS))


class LabeledProbe(pl.Callback):
    """What the encoder's features are worth, by k-NN or linear probe on labeled images, after the first step, which changes
    next to nothing and so shows where learning begins, every so many steps, and at the end.

    Logs the accuracy of each stage's and the final features as `knn/stage0`, `knn/stage0.2x2`, …, `knn/final`, that of the
    feature that training labels alone choose as `knn/chosen`, that of plain pixels as `knn/pixels`, and the time it took as
    `probe_s`; with the other method `probe/` for `knn/`. Training goes on as if nothing had been, bit for bit: nothing is
    drawn from global generators, and modes are put back.

    Args:
        settings: with `data` given.
        seed: of the draw of labels.
        preprocessing, config: what the encoder sees, and what it is.
        workers: reading processes.
        throughput: of the run, which leaves the time of the measures out.

    Raises:
        ValueError: for labeled data that cannot be used, or scikit-learn missing where it is needed.
    """

    def __init__(
        self,
        settings: ProbeSettings,
        seed: int,
        preprocessing: Preprocessing,
        config: EncoderConfig,
        every_steps: int,
        workers: int,
        throughput: Throughput,
    ) -> None:
        if settings.method == "probe":
            check_scikit_learn()
        self.settings, self.seed, self.preprocessing, self.every_steps = settings, seed, preprocessing, every_steps
        self.throughput = throughput
        self.channels, self.how = config.in_channels, EncoderPass(workers=workers)
        self.features, self.pixels = all_features(config, preprocessing.image_size), Pixels(preprocessing.image_size)
        source = open_labeled_source(settings.data, settings.column, settings.label_column)
        everything = draw_labels(source, settings.labels_per_class, seed)
        self.drawn = draw_labels(source, settings.labels_per_class, seed, settings.max_images)
        self.counts = [(len(kept.rows), len(all_of.rows)) for kept, all_of in zip(self.drawn[1:], everything[1:])]
        self.pools = pool_draws(source, [self.drawn])
        self.views: list[Iterable[ViewBatch]] = []
        self.unreadable: dict[str, str] = {}
        self.baseline: FeatureScore | None = None
        self.step = 0  # of the last measure; batches that are accumulated in one step end at the same one

    def read(self) -> None:
        """Take the images into memory where they fit, and see that there are some to be read.

        Raises:
            ValueError: when none of the training or of the test images can be.
        """
        image_bytes = self.channels * self.preprocessing.image_size[0] * self.preprocessing.image_size[1]
        kept = image_bytes * sum(len(part.rows) for part in self.pools.parts) <= KEEP_VIEWS_MIB * 2**20
        for part in self.pools.parts:
            views = load_views(self.preprocessing, self.channels, part.data, self.how)
            readable, seen, unreadable = 0, [], {}
            for viewed in views:
                readable += len(viewed.rows)
                record_unreadable(unreadable, viewed.unreadable)
                seen.append(viewed)
                if readable and not kept:
                    break
            check_any_readable(readable, unreadable)
            self.unreadable |= unreadable
            self.views.append(seen if kept else views)

    def __str__(self) -> str:
        """For the summary of a run, after `read`."""
        (train, of_train), (test, of_test) = self.counts
        how = {"knn": f"{self.settings.k}-NN", "probe": "logistic regression"}[self.settings.method]
        lines = (
            f"{how} on {train:,} of {of_train:,} labeled images, tested on {test:,} of {of_test:,}, "
            f"every {self.every_steps:,} steps"
        )
        if self.unreadable:
            path, why = next(iter(self.unreadable.items()))
            lines += f"; {len(self.unreadable):,} cannot be read, the first, {path}: {why}"
        return lines

    def on_train_batch_end(self, trainer: pl.Trainer, module: PretrainingModule, *_) -> None:
        """Measure after the first and every `every_steps`-th step."""
        step = trainer.global_step
        if step != self.step and (step == 1 or step % self.every_steps == 0):
            self.measure(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: PretrainingModule) -> None:
        """Measure the end."""
        if trainer.global_step != self.step:
            self.measure(trainer, module)

    def measure(self, trainer: pl.Trainer, module: PretrainingModule) -> None:
        """Log one measure. A model that is divided among processes computes only when all of them do."""
        self.step = trainer.global_step
        if not trainer.is_global_zero and module.device_mesh is None:
            return
        begun = time.perf_counter()
        try:
            embedded = self.embedded(trainer, module)
            values = self.values(embedded) if trainer.is_global_zero else {}
        except ValueError as error:  # a curve may have a gap; a run of days is not lost for it
            print(f"no measure on labeled images at step {self.step:,}: {error}", flush=True)
            return
        seconds = time.perf_counter() - begun
        self.throughput.leave_out(seconds)
        if trainer.is_global_zero:
            method = self.settings.method
            trainer.progress_bar_metrics[method] = values["chosen" if "chosen" in values else "final"]
            values = {f"{method}/{name}": value for name, value in values.items()} | {"probe_s": seconds}
            for logger in trainer.loggers:
                # Scalars of the n-th step stand at n - 1.
                logger.log_metrics(values, step=self.step - 1)

    def embedded(self, trainer: pl.Trainer, module: PretrainingModule) -> list[Embeddings]:
        """The images' vectors by the encoder as it is now, in the precision of training."""
        features = self.features if self.baseline else (*self.features, self.pixels)
        how = EncoderPass(device=module.device)
        with torch.random.fork_rng(devices=[]), whole(module), trainer.precision_plugin.forward_context():
            encoder = module.model.encoder
            return [
                collect_embeddings(encode_views(encoder, self.preprocessing, views, features, how)) for views in self.views
            ]

    def values(self, embedded: list[Embeddings]) -> dict[str, float]:
        """Test accuracies in [0, 1]: by the features' names without blanks, of the chosen one, and of plain pixels."""
        split = self.pools.split(self.drawn, embedded)
        scores = score_features(split, self.settings.method, self.settings.k, baseline=self.pixels.name)
        self.baseline = self.baseline or scores.row(self.pixels.name)
        values = {
            row.name.replace(", ", ".").replace(" ", ""): row.accuracy for row in scores.rows if row.name != self.pixels.name
        }
        if scores.best is not None:
            values["chosen"] = scores.best.accuracy
        return values | {"pixels": self.baseline.accuracy}


@contextlib.contextmanager
def whole(module: PretrainingModule) -> Iterator[None]:
    """Of a model that is divided among processes, the parameters outside its blocks put together, which else only the
    model's own forward pass does; blocks see to theirs. There must have been such a pass before."""
    if module.device_mesh is None:
        yield
        return
    module.model.unshard()
    try:
        yield
    finally:
        module.model.reshard()
