"""How long a run takes on this machine, measured by a few of its steps; and how many epochs fit into a given time."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable

import torch
from pytorch_lightning.utilities import move_data_to_device

from simmim.data import ImageSamples, collate
from simmim.messages import counted, length_text
from simmim.pretrain.module import PretrainingModule
from simmim.pretrain.settings import PretrainSettings
from simmim.training.optim import adamw, parameter_groups
from simmim.training.threads import FIRST_LOOK_S, Usage, cores_of_others, is_crowded, read_usage, threads_of_a_run

UNITS_S = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
LENGTH = re.compile("".join(rf"(?:(?P<{unit}>\d+(?:\.\d+)?){unit})?" for unit in UNITS_S))
MEASURED_S, MEASURED_BATCH = 3.0, 32  # on a CPU time grows with the batch, so that some images are enough
# While other processes keep cores busy: how many measures, and the pause before each, so that a moment of theirs decides
# nothing. A run shorter than that is measured once.
NUM_MEASURES, PAUSE_S, WORTH_MEASURES_S = 3, 3.0, 600.0
LEAST_LOADS, MOST_LOADS, LOADED_S = 2, 4, 1.0  # loads of the images, the first of which fills caches
WARM_UP_STEPS = {"cuda": 3, "mps": 3, "cpu": 1}
OTHER_SHARE = 0.05  # of a run's time: measures, pictures, checkpoints
DEFAULT_S = 3600.0  # of a run on a CPU whose length nobody gives
LONG_S = 1.25 * DEFAULT_S  # a run that takes longer is told what an hour would do
# Images times pixels of a run that is over in a few minutes, and is not measured.
SHORT_PIXELS = 1e8


def parse_length(text: str) -> float:
    """Seconds of "1h", "90m" or "1h30m".

    Raises:
        ValueError: for any other text, and for none at all.
    """
    match = LENGTH.fullmatch(text.replace(" ", ""))
    seconds = sum(float(value) * UNITS_S[unit] for unit, value in match.groupdict("0").items()) if match else 0.0
    if not seconds > 0:
        raise ValueError(f"time is {text!r}: give a length of time as 1h, 90m or 1h30m")
    return seconds


def num_processes(settings: PretrainSettings, device: str) -> int:
    """Processes of a run, one for each device."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return int(os.environ["WORLD_SIZE"])
    given = str(settings.devices)
    if given == "auto":
        count = torch.cuda.device_count() if device == "cuda" else 1
    else:
        count = int(given) if given.isdecimal() else len([part for part in given.split(",") if part.strip()])
    return count * int(settings.trainer.get("num_nodes", 1))


def is_short(settings: PretrainSettings, num_images: int) -> bool:
    """Whether a run is over in a few minutes on any machine."""
    height, width = settings.size
    return settings.epochs * num_images * height * width < SHORT_PIXELS


def seconds_per_step(module: PretrainingModule, samples: ImageSamples, settings: PretrainSettings, device: str) -> float:
    """The time of an optimizer step in seconds: of some steps on real images, the first ones of `samples`, whose loading is
    timed apart. Loading processes work beside the steps, else both times add up.

    Args:
        module: of its own, since its gradients and optimizer state are used. Its weights stay.
        settings: resolved.
        device: where it is measured: cuda, mps or cpu.
    """
    share, images = settings.batch_size // settings.optim.accumulate, settings.model.images_per_input
    count = min(share, max(MEASURED_BATCH // images, 1) * images) if device == "cpu" else share
    keys = [(0, index % len(samples)) for index in range(count)]
    loads: list[float] = []
    while len(loads) < LEAST_LOADS or (len(loads) < MOST_LOADS and sum(loads) < LOADED_S):
        started = time.perf_counter()
        batch = collate([samples[key] for key in keys])
        loads.append(time.perf_counter() - started)
    load_s = min(loads[1:]) * settings.batch_size / count  # the first time fills caches, those of the disk and of images
    is_long = settings.time is None or parse_length(settings.time) >= WORTH_MEASURES_S
    most = (NUM_MEASURES if is_long else 1) if device == "cpu" else 0
    step_s = beside_others(lambda: compute_seconds(module, batch, settings.precision, device), most)
    step_s *= settings.batch_size / count
    return max(step_s, load_s / settings.workers) if settings.workers else step_s + load_s


def beside_others(measure: Callable[[], float], most: int) -> float:
    """A measure with as many threads as the run will have: two that wait for one another are up to ten times slower than one
    beside a process that keeps a core busy. In that case the median of several.

    Args:
        most: measures at the most; 0 for one with the threads as they are, as on a GPU.
    """
    if not most:
        return measure()
    found: list[float] = []
    is_crowded = False
    while not found or (is_crowded and len(found) < most):
        with threads_of_a_run(PAUSE_S if found else FIRST_LOOK_S) as others:
            found.append(measure())
        is_crowded = is_crowded or others
    return statistics.median(found)


def compute_seconds(module: PretrainingModule, batch: dict, precision: str, device: str) -> float:
    """The median time of forward and backward pass and optimizer step on a batch. Torch's generator stays as it is."""
    module.to(device).train()
    batch = move_data_to_device(batch, torch.device(device))
    optimizer = adamw(parameter_groups(module.model, 0.0, 0.0))
    half = torch.bfloat16 if "bf16" in precision else torch.float16
    times: list[float] = []
    with torch.random.fork_rng(devices=[]):
        while len(times) <= WARM_UP_STEPS[device] or sum(times) < MEASURED_S:
            started = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast(device, half, enabled="16" in precision):
                loss = module.loss_of(batch)
            loss.backward()
            optimizer.step()
            if device != "cpu":
                getattr(torch, device).synchronize()
            times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP_STEPS[device] :])


def epochs_in(seconds: float, step_s: float, batch_size: int, num_images: int) -> float:
    """Epochs whose steps take that time less `OTHER_SHARE`, with three digits; one step at least."""
    steps = max(1.0, seconds * (1 - OTHER_SHARE) / step_s)
    return float(f"{steps * batch_size / num_images:.3g}")


def run_seconds(settings: PretrainSettings, num_images: int, step_s: float) -> float:
    """How long a run takes, with measures and pictures."""
    return settings.epochs * num_images / settings.batch_size * step_s / (1 - OTHER_SHARE)


def chosen_line(settings: PretrainSettings, epochs: float, num_images: int, step_s: float) -> str:
    """How many epochs the time allows, and where no time was given why it is an hour and what longer would take.

    Args:
        settings: resolved for the epochs that would be trained without a limit of time.
        epochs: as many as fit.
    """
    rest = f"{OTHER_SHARE:.0%} of it left for measures and pictures"
    if settings.time is not None:
        return f"chosen   {counted(epochs, 'epoch')}: what this machine does in {settings.time}, {rest}"
    whole = length_text(run_seconds(settings, num_images, step_s))
    return (
        f"chosen   {counted(epochs, 'epoch')}: what this CPU does in an hour; --epochs {settings.epochs:g}, as on a GPU, "
        f"would take {whole}, --time 3h three times as many epochs"
    )


def busy_lines(before: Usage | None, device: str, is_chosen: bool) -> list[str]:
    """What other processes took of a CPU while steps were measured, a line or none.

    Args:
        before: what the cores had done by then.
        is_chosen: whether the epochs were chosen by the measure.
    """
    after = read_usage()
    others = cores_of_others(before, after) if before and after and device == "cpu" else 0.0
    if not others or not is_crowded(others):
        return []
    then = (
        "these epochs are what fits beside them. Once they end more would: begin again then, or give --epochs"
        if is_chosen
        else "without them the run is faster"
    )
    cores = counted(len(os.sched_getaffinity(0)), "core")
    return [f"note     other processes kept {others:.1f} of {cores} busy while steps were measured: {then}"]


def estimate_line(settings: PretrainSettings, num_images: int, step_s: float) -> str:
    """How long a run takes, and where that is long what an hour would do."""
    seconds = run_seconds(settings, num_images, step_s)
    of_sizes = ", the mean of all image sizes" if settings.image_sizes else ""
    line = f"about {length_text(seconds)} on this machine, {step_s:.2g} s a step as measured{of_sizes}"
    if seconds <= LONG_S or settings.time is not None:
        return line
    return f"{line}; --time 1h would take {counted(epochs_in(DEFAULT_S, step_s, settings.batch_size, num_images), 'epoch')}"
