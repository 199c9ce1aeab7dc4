"""Accuracy of the features on labeled images in the course of pre-training."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import numpy as np
import pytorch_lightning as pl
import torch

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import open_labeled_source
from simmim.encoders.base import Encoder, EncoderConfig
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
    score_untrained,
    untrained_encoder,
    verdict,
)
from simmim.evaluate.features import AnyFeature
from simmim.messages import every
from simmim.pretrain.module import PretrainingModule
from simmim.pretrain.settings import ProbeSettings
from simmim.training.sharding import gathered

if TYPE_CHECKING:
    import datasets

KEEP_VIEWS_MIB = 512  # labeled images that take less stay in memory as the encoder sees them, and are read once


class LabeledProbe(pl.Callback):
    """Accuracy of k-NN or a linear probe on the encoder's features of labeled images.

    It is measured after the first step, which changes next to nothing and so shows where learning begins, then every
    `every_steps` steps, and at the end. Training goes on as without it, bit for bit: nothing is drawn from global
    generators, and the modes of modules are restored.

    Logged are the accuracies of each stage's and the final features as `knn/stage0`, `knn/stage0.2x2`, …, `knn/final`, of
    the feature that the training labels alone choose as `knn/chosen`, of plain pixels as `knn/pixels`, of the same encoder
    with random weights as `knn/untrained` (not where the model is sharded), and the time of the measure as `probe_s`. With
    the other method `probe/` takes the place of `knn/`.

    Args:
        settings: with `data` given.
        seed: of the draw of labels.
        preprocessing: of the encoder.
        config: of the encoder.
        workers: processes that read images.

    Raises:
        ValueError: for labeled data that cannot be used, or where scikit-learn is needed and missing.
    """

    def __init__(
        self,
        settings: ProbeSettings,
        seed: int,
        preprocessing: Preprocessing,
        config: EncoderConfig,
        every_steps: int,
        workers: int,
    ) -> None:
        if settings.method == "probe":
            check_scikit_learn()
        self.settings, self.seed, self.preprocessing, self.every_steps = settings, seed, preprocessing, every_steps
        self.channels, self.reading = config.in_channels, EncoderPass(workers=workers)
        self.features, self.pixels = all_features(config, preprocessing.image_size), Pixels(preprocessing.image_size)
        source = open_labeled_source(settings.data, settings.column, settings.label_column, preprocessing.reading_or_default)
        everything = draw_labels(source, settings.labels_per_class, seed)
        self.drawn = draw_labels(source, settings.labels_per_class, seed, settings.max_images)
        self.counts = [(len(kept.rows), len(all_of.rows)) for kept, all_of in zip(self.drawn[1:], everything[1:])]
        self.pools = pool_draws(source, [self.drawn])
        self.views: list[Iterable[ViewBatch]] = []
        self.unreadable: dict[str, str] = {}
        self.config = config
        self.baseline: FeatureScore | None = None
        self.untrained: FeatureScore | None = None
        self.last: dict[str, float] = {}  # accuracies of the last measure
        self.step = 0  # of the last measure; all batches that are accumulated in one step end at the same step

    def read(self) -> None:
        """Read the images into memory where they fit, and check that some can be read.

        Raises:
            ValueError: when none of the training images or none of the test images can be read.
        """
        image_bytes = self.channels * self.preprocessing.image_size[0] * self.preprocessing.image_size[1]
        keep = image_bytes * sum(len(part.rows) for part in self.pools.parts) <= KEEP_VIEWS_MIB * 2**20
        for part in self.pools.parts:
            views = load_views(self.preprocessing, self.channels, part.data, self.reading)
            num_readable = 0
            batches: list[ViewBatch] = []
            unreadable: dict[str, str] = {}
            for batch in views:
                num_readable += len(batch.rows)
                record_unreadable(unreadable, batch.unreadable)
                batches.append(batch)
                if num_readable and not keep:
                    break
            check_any_readable(num_readable, unreadable)
            self.unreadable |= unreadable
            self.views.append(batches if keep else views)

    def tested_images(self) -> datasets.Dataset:
        """The images that it is tested on, with the column `image`."""
        pool = self.pools.test
        return pool.data.select(np.searchsorted(pool.rows, self.drawn.test.rows))

    def __str__(self) -> str:
        """For the summary of a run, after `read`."""
        (train, of_train), (test, of_test) = self.counts
        method = {"knn": f"{self.settings.k}-NN", "probe": "logistic regression"}[self.settings.method]
        lines = (
            f"{method} on {train:,} of {of_train:,} labeled images, tested on {test:,} of {of_test:,}, "
            f"{every(self.every_steps, 'step')}"
        )
        if self.unreadable:
            path, why = next(iter(self.unreadable.items()))
            lines += f"; {len(self.unreadable):,} cannot be read, the first, {path}: {why}"
        return lines

    def on_train_batch_end(self, trainer: pl.Trainer, module: PretrainingModule, *_) -> None:
        """Measure after the first step and every `every_steps` steps."""
        step = trainer.global_step
        if step != self.step and (step == 1 or step % self.every_steps == 0):
            self.measure(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: PretrainingModule) -> None:
        """Measure the last step, unless it is measured already."""
        if trainer.global_step != self.step:
            self.measure(trainer, module)

    def measure(self, trainer: pl.Trainer, module: PretrainingModule) -> None:
        """Log one measure. All processes compute where the model is sharded, as none can alone."""
        self.step = trainer.global_step
        if not trainer.is_global_zero and module.device_mesh is None:
            return
        started = time.perf_counter()
        try:
            embedded = self.embed(trainer, module)
            if trainer.is_global_zero and module.device_mesh is None and self.baseline is None:
                self.untrained = self.score_untrained(module.device)
            values = self.accuracies(embedded) if trainer.is_global_zero else {}
        except ValueError as error:  # a curve may have a gap, which is no reason to stop a run of days
            print(f"no measure on labeled images at step {self.step:,}: {error}", flush=True)
            return
        seconds = time.perf_counter() - started
        if trainer.is_global_zero:
            method, self.last = self.settings.method, values
            trainer.progress_bar_metrics[method] = values["chosen" if "chosen" in values else "final"]
            values = {f"{method}/{name}": value for name, value in values.items()} | {"probe_s": seconds}
            for logger in trainer.loggers:
                # Scalars of the n-th step are logged at n - 1.
                logger.log_metrics(values, step=self.step - 1)

    def embed(self, trainer: pl.Trainer, module: PretrainingModule) -> list[Embeddings]:
        """Embeddings of the images by the encoder as it is now, in the precision of training."""
        features: tuple[AnyFeature, ...] = self.features if self.baseline else (*self.features, self.pixels)
        encoder_pass = EncoderPass(device=module.device)
        with torch.random.fork_rng(devices=[]), gathered(module), trainer.precision_plugin.forward_context():
            module.use_size(self.preprocessing.image_size)
            encoder = cast(Encoder, module.model.encoder)
            encoded = (encode_views(encoder, self.preprocessing, views, features, encoder_pass) for views in self.views)
            return [collect_embeddings(batches) for batches in encoded]

    def score_untrained(self, device: torch.device) -> FeatureScore | None:
        """The score of the encoder with random weights on the same images. It is computed once."""
        encoder, encoder_pass = untrained_encoder(self.config, self.seed), EncoderPass(device=device)
        batches = (encode_views(encoder, self.preprocessing, views, self.features, encoder_pass) for views in self.views)
        split = self.pools.split(self.drawn, [collect_embeddings(part) for part in batches])
        return score_untrained(split, self.settings.method, self.settings.k)

    def closing_lines(self, num_images: int) -> list[str]:
        """What the last measure says, and whether pre-training has helped; none where there was no measure.

        Args:
            num_images: of the pre-training.
        """
        if not self.last:
            return []
        name = "chosen" if "chosen" in self.last else "final"
        compared = {"plain pixels": "pixels", "the same encoder untrained": "untrained"}
        others = {words: self.last[key] for words, key in compared.items() if key in self.last}
        method = {"knn": f"{self.settings.k}-NN", "probe": "logistic regression"}[self.settings.method]
        figures = "".join(f", {words} {accuracy:.1%}" for words, accuracy in others.items())
        return [
            f"{method} on the labeled images: {self.last[name]:.1%} by {name} features{figures}",
            verdict(self.last[name], others, num_images),
        ]

    def accuracies(self, embedded: list[Embeddings]) -> dict[str, float]:
        """Test accuracies in [0, 1] by name: of each feature, of the chosen one, and of plain pixels."""
        split = self.pools.split(self.drawn, embedded)
        scores = score_features(split, self.settings.method, self.settings.k, baseline=self.pixels.name)
        self.baseline = self.baseline or scores.row(self.pixels.name)
        values = {
            row.name.replace(", ", ".").replace(" ", ""): row.accuracy for row in scores.rows if row.name != self.pixels.name
        }
        if scores.best is not None:
            values["chosen"] = scores.best.accuracy
        untrained = {"untrained": self.untrained.accuracy} if self.untrained else {}
        return values | {"pixels": self.baseline.accuracy} | untrained
