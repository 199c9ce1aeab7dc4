"""What a frozen encoder is worth: embeddings, k-NN, linear probe, and the stage whose features serve best.

Functions take and return values; only `embed` writes, one Parquet file, and shows a bar. Read it top down: which vector
stands for an image, images to vectors, vectors to a file, vectors and labels to accuracies.

Shape letters: N images, T of them to train on, D values of a vector, B images of a batch. Labels are class indices from 0.
"""
from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from simmim.checkpoint import Preprocessing, SavedEncoder
from simmim.data import UNREADABLE, CentreView, normalise, open_images, open_picture, reason, worker_count
from simmim.files import whole_file
from simmim.swinv2 import EncoderOutput, Size, SwinV2, SwinV2Config

if TYPE_CHECKING:
    import datasets

POOLINGS = ("mean", "2x2")
ROW_GROUP_BYTES = 32 * 2**20  # of vectors held before they are written, and a reader's smallest piece

# Of similarities held at a time: 1,024 × 16,384 float32 are 64 MiB.
TEST_ROWS, TRAIN_ROWS = 1024, 16384

# Inverse strengths of the probe's L2 penalty on standardised features. Where no cross-validation is possible, one that was
# the best or within a point of it at 1, 2 and 5 labels a class of real digits, for three features.
STRENGTHS = tuple(10.0**exponent for exponent in range(-4, 3))
DEFAULT_STRENGTH = 0.1
MAX_FOLDS, MAX_ITERATIONS = 5, 1000


# --- Which vector stands for an image ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """A vector that stands for an image.

    Args:
        stage: a stage's map, from 0, before merging and without the final norm; None for the last one's after the norm.
        pooling: mean of the map, C values; or 2x2, the means of its quarters, 4 · C values, channel by channel. Quarters
            of a map with an odd side share its middle.

    Raises:
        ValueError: for another pooling or a negative stage.
    """

    stage: int | None = None
    pooling: str = "mean"

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {self.pooling!r}: give one of {', '.join(POOLINGS)}")
        if self.stage is not None and (not isinstance(self.stage, int) or self.stage < 0):
            raise ValueError(f"stage is {self.stage!r}: give a number from 0, or None for the final features")

    @property
    def name(self) -> str:
        """For tables and keys: "stage 2", "stage 2, 2x2", "final"."""
        place = "final" if self.stage is None else f"stage {self.stage}"
        return place if self.pooling == "mean" else f"{place}, {self.pooling}"

    def dim(self, config: SwinV2Config) -> int:
        """D of an encoder of that architecture.

        Raises:
            ValueError: when it has no such stage.
        """
        if self.stage is not None and self.stage >= len(config.dims):
            raise ValueError(f"stage is {self.stage}: this encoder has stages 0 to {len(config.dims) - 1}")
        return config.dims[-1 if self.stage is None else self.stage] * (4 if self.pooling == "2x2" else 1)

    def of(self, output: EncoderOutput) -> Tensor:
        """(B, D) float32."""
        if self.stage is None and self.pooling == "mean":
            return output.pooled.float()
        features = (output.features if self.stage is None else output.stages[self.stage]).float()
        return features.mean(dim=(2, 3)) if self.pooling == "mean" else F.adaptive_avg_pool2d(features, 2).flatten(1)


def all_features(config: SwinV2Config, image_size: Size) -> tuple[Feature, ...]:
    """Every stage's and the final features, by each pooling that differs: a map of one token has no quarters."""
    found = []
    for stage in (*range(len(config.dims)), None):
        stride = config.strides[-1 if stage is None else stage]
        poolings = POOLINGS if max(image_size) > stride else ("mean",)
        found += [Feature(stage, pooling) for pooling in poolings]
    return tuple(found)


# --- Images to vectors ------------------------------------------------------------------------------------------------


class EmbeddedBatch(NamedTuple):
    """Some consecutive rows of a source.

    Attributes:
        rows: (B,) int64, their place in the source, of the images that could be read.
        paths: of the same; "row 7" for an image without a path.
        vectors: by `Feature.name`, (B, D) float32.
        unreadable: (path, reason) of the others.
    """

    rows: np.ndarray
    paths: list[str]
    vectors: dict[str, np.ndarray]
    unreadable: list[tuple[str, str]]


@dataclass(frozen=True)
class Embeddings:
    """All images of a source that could be read, in its order.

    Attributes:
        rows: (N,) int64, their place in the source, by which labels are found: `np.asarray(source["label"])[rows]`.
        paths: as in the source; "row 7" for an image without a path.
        vectors: by `Feature.name`, (N, D) float32.
        unreadable: reason by path of every image that could not be read.
    """

    rows: np.ndarray
    paths: tuple[str, ...]
    vectors: dict[str, np.ndarray]
    unreadable: dict[str, str]


def embeddings(
    encoder: SwinV2,
    preprocessing: Preprocessing,
    source: datasets.Dataset,
    features: Sequence[Feature] = (Feature(),),
    batch_size: int = 64,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    autocast: torch.dtype | None = None,
    progress: Callable[[int], object] | None = None,
) -> Embeddings:
    """Vectors of all images of `source`, several an image in one pass, held in memory.

    The result depends neither on the number of workers nor, but for rounding, on the batch.

    Args:
        encoder: moved to `device`; in evaluation mode during the pass.
        source: with a column `image`, undecoded, as from `simmim.data.open_images`.
        features: which vectors; `all_features` gives every one.
        workers: reading processes; 0 reads in this one, None chooses for this machine.
        autocast: a type to compute in, `torch.bfloat16` for instance; vectors are float32 in any case.
        progress: called with the number of images, readable or not, that each batch has dealt with.

    Raises:
        ValueError: for a source without rows, or of which nothing can be read; a stage that the encoder does not have;
            a batch size or a number of workers out of range.
    """
    batches, unreadable = [], {}
    for batch in embedded_batches(encoder, preprocessing, source, features, batch_size, workers, device, autocast):
        note_unreadable(unreadable, batch.unreadable)
        batches.append(batch)
        if progress:
            progress(len(batch.rows) + len(batch.unreadable))
    check_any_read(sum(len(batch.rows) for batch in batches), unreadable)
    return Embeddings(
        np.concatenate([batch.rows for batch in batches]),
        tuple(path for batch in batches for path in batch.paths),
        {name: np.concatenate([batch.vectors[name] for batch in batches]) for name in batches[0].vectors},
        unreadable,
    )


def embedded_batches(
    encoder: SwinV2,
    preprocessing: Preprocessing,
    source: datasets.Dataset,
    features: Sequence[Feature] = (Feature(),),
    batch_size: int = 64,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    autocast: torch.dtype | None = None,
) -> Iterator[EmbeddedBatch]:
    """As `embeddings`, batch by batch as they come; a batch without a readable image comes too.

    Raises:
        ValueError: as `embeddings`, except that an all unreadable source is the caller's to notice.
    """
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}: give 1 or more")
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}: give 0 to read in the main process, or more")
    if not len(source):
        raise ValueError("the source holds no images: give one with at least one")
    for feature in features:
        feature.dim(encoder.config)
    device = torch.device(device)
    pieces = [range(first, min(first + batch_size, len(source))) for first in range(0, len(source), batch_size)]
    workers = min(worker_count(device.type) if workers is None else workers, len(pieces))
    loader = DataLoader(
        ViewedRows(source, evaluation_view(preprocessing), encoder.config.in_channels),
        batch_size=None,
        sampler=pieces,
        num_workers=workers,
        collate_fn=as_it_is,
        pin_memory=device.type == "cuda",
    )
    return run_through(encoder.to(device), preprocessing, loader, tuple(features), device, autocast)


def run_through(
    encoder: SwinV2,
    preprocessing: Preprocessing,
    loader: DataLoader,
    features: tuple[Feature, ...],
    device: torch.device,
    autocast: torch.dtype | None,
) -> Iterator[EmbeddedBatch]:
    """The loader's batches, encoded; the encoder's mode is as before when they end."""
    was_training = encoder.training
    stages = any(feature.stage is not None for feature in features)
    nothing = {feature.name: np.empty((0, feature.dim(encoder.config)), np.float32) for feature in features}

    def encode(images: Tensor) -> dict[str, np.ndarray]:
        # Not around the loop: between two batches of a generator its caller would be in inference mode as well.
        with torch.inference_mode():
            images = normalise(images.to(device, non_blocking=True), preprocessing.mean, preprocessing.std)
            with torch.autocast(device.type, dtype=autocast) if autocast else contextlib.nullcontext():
                output = encoder(images, return_stages=stages)
            return {feature.name: feature.of(output).cpu().numpy() for feature in features}

    try:
        encoder.eval()
        for viewed in loader:
            vectors = encode(viewed.images) if viewed.rows else nothing
            yield EmbeddedBatch(np.array(viewed.rows, np.int64), viewed.paths, vectors, viewed.unreadable)
    finally:
        encoder.train(was_training)


def evaluation_view(preprocessing: Preprocessing) -> CentreView:
    """What an encoder's preprocessing sees of an image."""
    return CentreView(preprocessing.image_size, preprocessing.crop, preprocessing.interpolation, preprocessing.fit)


class Viewed(NamedTuple):
    """Rows read: `images` (B, channels, height, width) uint8; the rest is as in `EmbeddedBatch`."""

    rows: list[int]
    paths: list[str]
    images: Tensor
    unreadable: list[tuple[str, str]]


class ViewedRows(Dataset):
    """By a range of rows their images' views; a batch at a time, so that one tensor leaves the process, not many."""

    def __init__(self, source: datasets.Dataset, view: CentreView, channels: int) -> None:
        self.source, self.view, self.channels = source, view, channels

    def __getitem__(self, rows: range) -> Viewed:
        read, paths, views, unreadable = [], [], [], []
        for row in rows:
            record = self.source[row]["image"]
            path = record["path"] or f"row {row}"
            try:
                views.append(self.view(open_picture(record, self.channels)))
            except UNREADABLE as error:
                unreadable.append((path, reason(error)))
                continue
            read.append(row)
            paths.append(path)
        images = torch.stack(views) if views else torch.empty((0, self.channels, *self.view.size), dtype=torch.uint8)
        return Viewed(read, paths, images, unreadable)


def as_it_is(viewed: Viewed) -> Viewed:
    """For a loader whose samples are batches already."""
    return viewed


def note_unreadable(noted: dict[str, str], found: Sequence[tuple[str, str]]) -> None:
    """Add reasons by path. Shards may hold several images of one name; each is kept, so that the count is right."""
    for path, why in found:
        name, number = path, 2
        while name in noted:
            name, number = f"{path} ({number})", number + 1
        noted[name] = why


def check_any_read(count: int, unreadable: Mapping[str, str]) -> None:
    """Refuse a source of which nothing could be read.

    Raises:
        ValueError: with the first image's reason.
    """
    if not count:
        path, why = next(iter(unreadable.items()))
        raise ValueError(f"none of {len(unreadable)} images can be read; the first, {path}: {why}")


# --- Vectors to a file ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbedResult:
    """What `embed` has written.

    Attributes:
        count: rows of the file, one an image that could be read.
        dim: values of a vector.
        unreadable: reason by path of every image that could not be read.
    """

    count: int
    dim: int
    unreadable: dict[str, str]


def embed(
    saved: SavedEncoder,
    images: str | Path | Sequence[str] | datasets.Dataset,
    out: str | Path,
    stage: int | None = None,
    pooling: str = "mean",
    batch_size: int = 64,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    autocast: torch.dtype | None = None,
) -> EmbedResult:
    """Write every image's vector to the Parquet file `out`, whole or not at all.

    Columns: `path`, text, and `vector`, a list of D float32; rows in the order of the images. A row group of
    about 32 MiB is in memory, whatever the number of images. The file's schema says under the key `simmim`, as JSON, which
    encoder, preprocessing and feature the vectors are from.

    Args:
        images: as `simmim.data.open_images` takes them, or a dataset that it has opened.
        stage, pooling: as of `Feature`.
        batch_size, workers, device, autocast: as of `embeddings`.

    Raises:
        ValueError: when `out` exists, and as `embeddings`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = Path(out).expanduser()
    if out.exists():
        raise ValueError(f"{str(out)!r} exists: give a new file")
    feature = Feature(stage, pooling)
    dim = feature.dim(saved.encoder.config)
    source = images if hasattr(images, "column_names") else open_images(images)
    batches = embedded_batches(
        saved.encoder, saved.preprocessing, source, (feature,), batch_size, workers, device, autocast
    )
    origin = {
        "encoder": str(saved.report.source),
        "provenance": saved.provenance,
        "architecture": saved.encoder.config.as_dict(),
        "preprocessing": asdict(saved.preprocessing),
        "stage": stage,
        "pooling": pooling,
    }
    schema = pa.schema(
        {"path": pa.string(), "vector": pa.list_(pa.float32(), dim)},
        metadata={"simmim": json.dumps(origin, default=str)},
    )
    rows_at_once = max(1, ROW_GROUP_BYTES // (4 * dim))
    count, unreadable, paths, vectors = 0, {}, [], []

    with whole_file(out) as temporary:
        # No dictionary: hardly two values of the vectors are alike.
        with pq.ParquetWriter(temporary, schema, use_dictionary=False) as writer:

            def write() -> None:
                values = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(vectors).reshape(-1)), dim)
                columns = [pa.array(paths, pa.string()), values]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(paths))
                paths.clear()
                vectors.clear()

            with tqdm(total=len(source), desc="embedding", unit="image") as bar:
                for batch in batches:
                    note_unreadable(unreadable, batch.unreadable)
                    count += len(batch.rows)
                    paths += batch.paths
                    vectors.append(batch.vectors[feature.name])
                    if len(paths) >= rows_at_once:
                        write()
                    bar.update(len(batch.rows) + len(batch.unreadable))
            if paths:
                write()
        check_any_read(count, unreadable)
    return EmbedResult(count, dim, unreadable)


# --- k-NN -------------------------------------------------------------------------------------------------------------


def knn(
    train: np.ndarray,
    train_labels: Sequence[int] | np.ndarray,
    test: np.ndarray,
    test_labels: Sequence[int] | np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
    device: str | torch.device = "cpu",
) -> float:
    """Share of `test` that `knn_predict` gets right, in [0, 1].

    Args:
        test_labels: (N,) class indices; one that `train_labels` does not hold counts as missed.

    Raises:
        ValueError: as `knn_predict`.
    """
    test, test_labels = checked(test, test_labels, "test")
    return float(np.mean(knn_predict(train, train_labels, test, k, temperature, classes, device) == test_labels))


def knn_predict(
    train: np.ndarray,
    train_labels: Sequence[int] | np.ndarray,
    test: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """The class of each test vector by its `k` nearest training vectors, as in DINO's evaluation (arXiv 2104.14294).

    Nearness is the cosine similarity s; a neighbour votes for its class with weight exp(s / temperature). Of classes with
    equal votes the first wins. At most `TEST_ROWS` × `TRAIN_ROWS` similarities are held at a time.

    Args:
        train, test: (T, D) and (N, D).
        train_labels: (T,) class indices.
        k: neighbours; no more than T are used.
        temperature: the smaller, the more the nearest counts.
        classes: number of classes, to check the labels against.
        device: where similarities are computed.

    Returns:
        (N,) int64.

    Raises:
        ValueError: for vectors that are no finite matrix, of different D, or that do not match their labels; a label, a k
            or a temperature out of range.
    """
    train, labels = checked(train, train_labels, "train")
    test = checked_vectors(test, "test")
    check_alike(train, test)
    if k < 1:
        raise ValueError(f"k is {k}: give 1 or more neighbours")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a positive number")
    if classes is not None and labels.max() >= classes:
        raise ValueError(f"a train label is {labels.max()}: with {classes} classes, give 0 to {classes - 1}")
    classes = classes or int(labels.max()) + 1
    of_train, predictions = torch.from_numpy(labels), []
    for first in range(0, len(test), TEST_ROWS):
        similarity, neighbour = nearest_vectors(test[first : first + TEST_ROWS], train, k, device)
        # Votes relative to the nearest neighbour's: a small temperature would exceed the largest number.
        weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
        votes = weights.new_zeros(len(similarity), classes).scatter_add_(1, of_train[neighbour], weights)
        predictions.append(votes.argmax(dim=1).numpy())
    return np.concatenate(predictions)


def nearest_vectors(
    queries: np.ndarray, vectors: np.ndarray, k: int, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine similarity and row of each query's `k` most similar vectors, or of all where they are fewer, the nearest first:
    two times (N, k), on the CPU. A vector of zeros is like none, similarity 0."""
    unit = F.normalize(torch.from_numpy(queries).to(device), dim=1)
    similarity = unit.new_empty(len(unit), 0)
    rows = torch.empty(len(unit), 0, dtype=torch.int64, device=unit.device)
    for first in range(0, len(vectors), TRAIN_ROWS):
        part = F.normalize(torch.from_numpy(vectors[first : first + TRAIN_ROWS]).to(device), dim=1)
        found = unit @ part.T
        best, place = found.topk(min(k, len(part)), dim=1)
        similarity, rows = torch.cat([similarity, best], dim=1), torch.cat([rows, place + first], dim=1)
        similarity, place = similarity.topk(min(k, similarity.shape[1]), dim=1)
        rows = rows.gather(1, place)
    return similarity.cpu(), rows.cpu()


# --- Linear probe -----------------------------------------------------------------------------------------------------


class CrossValidated(NamedTuple):
    """Accuracy over the folds, in [0, 1], with one strength of the penalty."""

    c: float
    mean: float
    std: float


@dataclass(frozen=True)
class ProbeResult:
    """A linear classifier over frozen features.

    Attributes:
        accuracy: on the test vectors, in [0, 1].
        c: inverse strength of the L2 penalty, scikit-learn's C.
        predictions: (N,) int64, the test vectors' classes.
        cross_validation: on the training vectors, for each of `STRENGTHS`; empty where it was not possible.
        folds: of the cross-validation; 0 where it was not possible.
        converged: whether the final fit has, within `MAX_ITERATIONS`.
    """

    accuracy: float
    c: float
    predictions: np.ndarray
    cross_validation: tuple[CrossValidated, ...]
    folds: int
    converged: bool

    @property
    def cross_validated(self) -> float | None:
        """The chosen strength's accuracy on the training vectors, held out in turn; None where that was not possible."""
        return max((row.mean for row in self.cross_validation), default=None)


def linear_probe(
    train: np.ndarray,
    train_labels: Sequence[int] | np.ndarray,
    test: np.ndarray,
    test_labels: Sequence[int] | np.ndarray,
    seed: int = 0,
) -> ProbeResult:
    """Logistic regression over standardised features, its penalty chosen by cross-validation on `train` alone.

    Folds are stratified, as many as the smallest class has labels, at most 5; in each, features are standardised by what
    is fitted. Of strengths with equal accuracy the strongest penalty wins. With a single label in a class there is
    nothing to hold out: C is then `DEFAULT_STRENGTH`. Computed in float64, 8 · T · D bytes and some copies: for T up to
    some ten thousand.

    Args:
        train, test: (T, D) and (N, D).
        train_labels, test_labels: (T,) and (N,) class indices; test labels without training vectors count as missed.
        seed: of the division into folds.

    Raises:
        ValueError: for vectors that are no finite matrix, of different D, or that do not match their labels; fewer than
            two classes; scikit-learn not installed.
    """
    try:
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise ValueError(
            "the linear probe needs scikit-learn, which is not installed: pip install 'simmim-toolkit[probe]'"
        ) from error
    train, train_labels = checked(train, train_labels, "train", np.float64)
    test, test_labels = checked(test, test_labels, "test", np.float64)
    check_alike(train, test)
    found, counts = np.unique(train_labels, return_counts=True)
    if len(found) < 2:
        raise ValueError(f"all train labels are {found[0]}: give vectors of at least two classes")
    folds = min(MAX_FOLDS, int(counts.min()))
    folds = folds if folds > 1 else 0
    c, table = DEFAULT_STRENGTH, ()
    if folds:
        accuracies = []
        for fitted, held_out in StratifiedKFold(folds, shuffle=True, random_state=seed).split(train, train_labels):
            fits = logistic_fits(train[fitted], train_labels[fitted], STRENGTHS)
            accuracies.append([np.mean(predict(train[held_out]) == train_labels[held_out]) for predict, _ in fits])
        means, stds = np.mean(accuracies, axis=0), np.std(accuracies, axis=0)
        table = tuple(CrossValidated(*map(float, row)) for row in zip(STRENGTHS, means, stds))
        c = max(table, key=lambda row: row.mean).c  # of equals the first
    ((predict, converged),) = logistic_fits(train, train_labels, (c,))
    predictions = predict(test)
    return ProbeResult(float(np.mean(predictions == test_labels)), c, predictions, table, folds, converged)


def logistic_fits(
    vectors: np.ndarray, labels: np.ndarray, strengths: Sequence[float]
) -> Iterator[tuple[Callable[[np.ndarray], np.ndarray], bool]]:
    """For one C after another, ascending, how to classify vectors and whether the fit has converged. Use each before the
    next: they are one model, which starts from its last solution."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(vectors)
    scaled = scaler.transform(vectors)
    model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)

    def predict(others: np.ndarray) -> np.ndarray:
        return model.predict(scaler.transform(others))

    for c in strengths:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.set_params(C=c).fit(scaled, labels)
        yield predict, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


# --- Every stage ------------------------------------------------------------------------------------------------------


class StageScore(NamedTuple):
    """One feature's worth; accuracies in [0, 1].

    Attributes:
        name: of the feature.
        dim: D.
        knn: accuracy on the test vectors.
        probe: of the linear probe on the test vectors.
        c: the probe's.
        cross_validated: the probe's accuracy on the training vectors; None with a single label in a class.
        converged: as of `ProbeResult`.
    """

    name: str
    dim: int
    knn: float
    probe: float
    c: float
    cross_validated: float | None
    converged: bool


@dataclass(frozen=True)
class StageScores:
    """Every feature's worth.

    Attributes:
        rows: in the features' order.
        winner: the one of the highest cross-validated accuracy, of equals the shortest; None with a single label in a
            class, where nothing but the test labels could choose.
    """

    rows: tuple[StageScore, ...]
    winner: StageScore | None


def probe_stages(
    train: Mapping[str, np.ndarray],
    train_labels: Sequence[int] | np.ndarray,
    test: Mapping[str, np.ndarray],
    test_labels: Sequence[int] | np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
    progress: Callable[[StageScore], object] | None = None,
) -> StageScores:
    """k-NN and linear probe over several features, and which of them to take.

    The winner is chosen by cross-validation on the training vectors and never by test accuracy: the best of many test
    accuracies is too high by what luck adds to it, so only the winner's own may be reported as what to expect.

    Args:
        train, test: by name (T, D) and (N, D), as `Embeddings.vectors` of `all_features`.
        k, temperature: as of `knn_predict`.
        seed: of the folds, which are the same for every feature.
        progress: called with each row when it is there.

    Raises:
        ValueError: when the two hold different features, and as `knn` and `linear_probe`.
    """
    if set(train) != set(test) or not train:
        differing = ", ".join(sorted(set(train) ^ set(test))) or "none given"
        raise ValueError(f"train and test features differ ({differing}): give the same, at least one")
    rows = []
    for name, vectors in train.items():
        accuracy = knn(vectors, train_labels, test[name], test_labels, k, temperature)
        probe = linear_probe(vectors, train_labels, test[name], test_labels, seed)
        row = StageScore(
            name, vectors.shape[1], accuracy, probe.accuracy, probe.c, probe.cross_validated, probe.converged
        )
        rows.append(row)
        if progress:
            progress(row)
    held = [row for row in rows if row.cross_validated is not None]
    return StageScores(tuple(rows), max(held, key=lambda row: (row.cross_validated, -row.dim), default=None))


def stages_table(scores: StageScores) -> str:
    """As Markdown, accuracies in percent, the winner in bold, and below how it was chosen."""
    lines = [
        "| feature | values | k-NN | linear probe | C | cross-validated |",
        "| :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in scores.rows:
        name = f"**{row.name}**" if row == scores.winner else row.name
        held = "–" if row.cross_validated is None else f"{100 * row.cross_validated:.1f}"
        probe = f"{100 * row.probe:.1f}{'' if row.converged else ' (not converged)'}"
        lines.append(f"| {name} | {row.dim} | {100 * row.knn:.1f} | {probe} | {row.c:g} | {held} |")
    if scores.winner is None:
        chosen = "None is chosen: a class has a single label, which cross-validation cannot hold out."
    else:
        chosen = f"Chosen by cross-validation on the training images alone: {scores.winner.name}."
    return "\n".join([*lines, "", chosen])


# --- What is given ----------------------------------------------------------------------------------------------------


def checked_vectors(vectors: np.ndarray, which: str, kind: type = np.float32) -> np.ndarray:
    """`vectors` as (N, D) of `kind`.

    Raises:
        ValueError: when they are no matrix, empty or not finite.
    """
    vectors = np.require(vectors, kind, ["C", "W"])  # what Arrow shows of its memory cannot be written, which torch minds
    if vectors.ndim != 2 or not vectors.size:
        raise ValueError(f"{which} vectors have shape {vectors.shape}: give (images, values), at least one of each")
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise ValueError(f"{which} vector {row} is not finite: leave it out, or embed without autocast")
    return vectors


def checked(
    vectors: np.ndarray, labels: Sequence[int] | np.ndarray, which: str, kind: type = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """`vectors` as by `checked_vectors`, and one label for each, (N,) int64.

    Raises:
        ValueError: when they are not that.
    """
    vectors, labels = checked_vectors(vectors, which, kind), np.asarray(labels)
    if labels.shape != (len(vectors),):
        raise ValueError(f"{which} labels have shape {labels.shape}: give one for each of {len(vectors)} vectors")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{which} labels are of type {labels.dtype}: give class indices, whole numbers from 0")
    if labels.min() < 0:
        raise ValueError(f"a {which} label is {labels.min()}: give class indices from 0")
    return vectors, labels.astype(np.int64)


def check_alike(train: np.ndarray, test: np.ndarray) -> None:
    """Refuse vectors of different lengths.

    Raises:
        ValueError: with both.
    """
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train vectors have {train.shape[1]} values, test vectors {test.shape[1]}: give the same feature")
