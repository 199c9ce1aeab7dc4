"""Loading processes: batches of samples in worker processes, and how many of these a machine has room for."""

from __future__ import annotations

import multiprocessing.context
import multiprocessing.queues
import os
import signal

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def build_loader(samples: Dataset, workers: int, order: Sampler | None = None, batch_size: int | None = None) -> DataLoader:
    """A loader with `workers` processes; its batches are in pinned memory if there is a GPU.

    Args:
        order: batches of keys, for `ImageSamples`.
        batch_size: samples per batch, for `StreamedSamples`, which have an order of their own.
    """
    options = {"batch_sampler": order} if order is not None else {"batch_size": batch_size}
    return DataLoader(
        samples,
        **options,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        multiprocessing_context=quiet_context() if workers else None,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_signals,
    )


FOR_SOME = ("weak", "box", "partner", "partner_map")  # tensors of some samples of a batch, of unlabeled images


class QuietQueue(multiprocessing.queues.Queue):
    """A queue that prints no traceback when the process that it feeds has died. The main process meets that death too, and
    reports it."""

    @staticmethod
    def _on_queue_feeder_error(error: Exception, item) -> None:
        if not isinstance(error, BrokenPipeError):
            multiprocessing.queues.Queue._on_queue_feeder_error(error, item)  # type: ignore[attr-defined]


def quiet_context() -> multiprocessing.context.BaseContext:
    """The default way of starting processes, with `QuietQueue` as its queues."""
    context = multiprocessing.get_context()

    class QuietContext(type(context)):  # type: ignore[misc]
        def Queue(self, maxsize: int = 0) -> QuietQueue:
            return QuietQueue(maxsize, ctx=self.get_context())

    return QuietContext()


def collate(samples: list[dict]) -> dict:
    """Samples to a batch: images, label maps, labels, each of their further views, and `FOR_SOME` are stacked; all else
    becomes lists."""
    batch = {
        "image": torch.stack([sample["image"] for sample in samples]),
        "seed": [sample["seed"] for sample in samples],
        "skipped": [entry for sample in samples for entry in sample["skipped"]],
    }
    gray_copies = [path for sample in samples for path in sample.get("gray_copies", ())]
    if gray_copies:
        batch["gray_copies"] = gray_copies
    for name in ("stream_position", "file", "objects", "masks", "row", "own_size", "empty_tiles"):
        if name in samples[0]:
            batch[name] = [sample[name] for sample in samples]
    for name in FOR_SOME:
        if parts := [sample[name] for sample in samples if name in sample]:
            batch[name] = torch.stack(parts)
    if "views" in samples[0]:
        batch["views"] = [torch.stack(views) for views in zip(*(sample["views"] for sample in samples))]
    if "label_map" in samples[0]:
        batch["label_map"] = torch.stack([sample["label_map"] for sample in samples])
    if "label" in samples[0]:
        batch["label"] = torch.tensor([sample["label"] for sample in samples])
    return batch


def ignore_signals(worker: int) -> None:
    """Leave signals of a terminal or a scheduler to the process that trains. They are sent to a group of processes, which
    this loading process leaves. SIGTERM still ends it, because that is how loading processes are stopped."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_num_workers(device: str) -> int:
    """Loading processes for this machine. For a GPU: all cores but one, up to 16. For a CPU, where training needs the other
    cores: a quarter of them, up to 4."""
    return max(1, min(available_cores() - 1, 16)) if device != "cpu" else min(max(available_cores() // 4, 1), 4)
