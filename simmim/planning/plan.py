"""What a pre-training run will need of its devices, by arithmetic alone: parameters, FLOPs, memory, and the switches to
turn on until it fits. Nothing is allocated, so a model that no machine here could hold is planned as fast as a small one.

Shape letters as in `simmim.encoders.swinv2`: B images, C channels, h heads, M windows of an image, N tokens of a window. The
formulas name what autograd keeps of `SwinV2Block` and `SimMIM`; tests/test_plan.py holds them against the bytes of
real steps, so whoever changes what those keep changes it here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch

from simmim.defaults import default_batch_size, default_mask_unit, default_window
from simmim.encoders.base import Size
from simmim.encoders.swinv2.config import SwinV2Config, as_pair
from simmim.encoders.swinv2.model import CPB_HIDDEN, PIECE_LOGITS, SwinV2
from simmim.methods.simmim import SimMIM

GIB = 2**30
PRECISIONS = ("bf16-mixed", "32-true")
STRATEGIES = ("ddp", "fsdp")
# Of a device's memory, what tensors may fill. The rest is for the driver, libraries' workspaces and gaps between tensors.
USABLE_SHARE = 0.9


@dataclass(frozen=True)
class Setup:
    """How a run is spread over devices and what it trades for memory.

    Args:
        batch_per_device: B, images a device takes at once.
        devices: how many share the work.
        precision: bf16-mixed or 32-true, as Lightning names them.
        strategy: ddp, a whole copy of the model on each device, or fsdp, each block a unit spread over all of them and
            gathered in float32, as torch's fully_shard does without a policy of its own.
        checkpoint_activations, sequential_attention: as in `SwinV2`.
        device: cuda or cpu. Autocast normalizes in float32 on the former and in bfloat16 on the latter.

    Raises:
        ValueError: for a setting out of range.
    """

    batch_per_device: int
    devices: int = 1
    precision: str = "bf16-mixed"
    strategy: str = "ddp"
    checkpoint_activations: bool = False
    sequential_attention: int | None = None
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name, known in (("precision", PRECISIONS), ("strategy", STRATEGIES), ("device", ("cuda", "cpu"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give {' or '.join(known)}")
        for name in ("batch_per_device", "devices", "sequential_attention"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more")

    @property
    def compute_bytes(self) -> int:
        """Of a number that matrices multiply."""
        return 2 if self.precision == "bf16-mixed" else 4

    @property
    def norm_bytes(self) -> int:
        """Of a number on the main path and in the norms that join it."""
        return 4 if self.device == "cuda" else self.compute_bytes

    @property
    def sharded(self) -> bool:
        """Whether each device holds but its share of the model."""
        return self.strategy == "fsdp" and self.devices > 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters, gradients, optimizer: float32 whatever the precision; AdamW's two moments.
        exchange: what only several devices need: DDP's buckets, a second copy of the gradients; FSDP's whole units, all but
            the blocks throughout and of these two at a time, with the gradient of one that is worked out and sent.
        activations: kept from the forward pass for the backward pass, with the images and the cached masks.
        working: what the hungriest step of either pass needs besides.
        peak: of all this, the most at one time. Less than the sum: gradients come when activations go.
    """

    parameters: int
    gradients: int
    optimizer: int
    exchange: int
    activations: int
    working: int
    peak: int


@dataclass(frozen=True)
class Plan:
    """What a run needs, and what to turn on so that it fits.

    Attributes:
        encoder_parameters, head_parameters: numbers; the head is the mask token and the decoder.
        forward_flops, training_flops: of one image, matrix products alone; training with all that is computed again.
        asked, memory: the setup that was asked for and its memory.
        recommended, recommended_memory: the first that fits; None where not even one image does.
        largest_batch: images a device that fit with the recommended switches; 0 where None.
    """

    title: str
    config: SwinV2Config
    image_size: Size
    device_memory_gib: float
    encoder_parameters: int
    head_parameters: int
    forward_flops: int
    training_flops: int
    asked: Setup
    memory: Memory
    recommended: Setup | None
    recommended_memory: Memory | None
    largest_batch: int


# --- shapes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageShape:
    """One stage on one image: `tokens` of its map, and `padded` ones in `windows` windows of `window_tokens`."""

    dim: int
    heads: int
    hidden: int
    tokens: int
    padded: int
    window: Size
    windows: int
    shifts: bool

    @property
    def window_tokens(self) -> int:
        """N."""
        return self.window[0] * self.window[1]

    @property
    def offsets(self) -> int:
        """Between two tokens of a window: rows of the position-bias table."""
        return (2 * self.window[0] - 1) * (2 * self.window[1] - 1)


def stage_shapes(config: SwinV2Config, image_size: Size) -> list[StageShape]:
    """What each stage works on."""
    size = tuple(-(-side // config.patch_size) for side in image_size)
    stages = []
    for dim, heads, window in zip(config.dims, config.num_heads, config.windows(image_size)):
        windows = math.prod(-(-side // w) for side, w in zip(size, window))
        shifts = any(side > w and w > 1 for side, w in zip(size, window))
        padded = windows * math.prod(window)
        stages.append(StageShape(dim, heads, int(dim * config.mlp_ratio), math.prod(size), padded, window, windows, shifts))
        size = tuple(-(-side // 2) for side in size)
    return stages


# --- FLOPs --------------------------------------------------------------------------------------------------------------


def flops(config: SwinV2Config, image_size: Size, setup: Setup, predicted: float = 1.0) -> tuple[int, int]:
    """Forward and training FLOPs of one image in a batch of `setup.batch_per_device`, two a multiply-add, matrix
    products alone. The position bias is computed once a batch, so each image bears its share. `predicted` is the share of
    the image's squares whose pixels are (`SimMIM.masked_squares`); 0 for the encoder alone."""
    stages = stage_shapes(config, image_size)
    blocks = attention = 0.0
    for stage, depth in zip(stages, config.depths):
        core = 2 * 2 * stage.padded * stage.window_tokens * stage.dim  # logits and what they weigh
        linear = 2 * stage.dim * (stage.padded * 4 * stage.dim + stage.tokens * 2 * stage.hidden)
        bias = 2 * stage.offsets * CPB_HIDDEN * (2 + stage.heads) / setup.batch_per_device
        attention += depth * core
        blocks += depth * (core + linear + bias)
    embed = 2 * stages[0].tokens * stages[0].dim * config.in_channels * config.patch_size**2
    merging = sum(2 * after.tokens * 4 * before.dim * after.dim for before, after in pairwise(stages))
    decoder = predicted * 2 * stages[-1].tokens * stages[-1].dim * config.in_channels * config.strides[-1] ** 2
    forward = embed + blocks + merging + decoder
    # A product has two gradients, but images need none.
    training = 3 * forward - embed
    if setup.checkpoint_activations:
        training += blocks
    if setup.sequential_attention is not None:
        training += attention // 2  # logits alone: what they weigh is not needed again
    return round(forward), round(training)


# --- memory -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One step of the forward pass as memory sees it: bytes on one device.

    Attributes:
        parameters: how many, not bytes.
        kept: from its forward pass to its backward pass.
        cast: what autocast keeps of the weights until the whole forward pass is over, and no longer.
        rebuilt: what the backward pass computes anew and keeps until it is through.
        forward, backward: what either needs besides, for a moment.
        gathered: under FSDP, its parameters whole, where it is a unit of its own.
    """

    parameters: int
    kept: float
    cast: float = 0.0
    rebuilt: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    gathered: int = 0


@lru_cache(maxsize=64)
def parameter_counts(config: SwinV2Config) -> tuple[int, tuple[tuple[int, ...], ...], tuple[int, ...], int, int]:
    """Parameters of the patch embedding, each stage's blocks, each merging layer, the final norm, and SimMIM's head."""
    with torch.device("meta"):
        model = SimMIM(SwinV2(config))
    encoder = model.encoder

    def count(*modules) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    return (
        count(encoder.patch_embed),
        tuple(tuple(count(block) for block in stage.blocks) for stage in encoder.layers),
        tuple(count(stage.downsample) for stage in encoder.layers[:-1]),
        count(encoder.norm),
        count(model.decoder) + model.mask_token.numel(),
    )


def layers(config: SwinV2Config, image_size: Size, setup: Setup) -> list[Layer]:
    """The steps of SimMIM's forward pass, in order: patches, blocks and mergings, prediction with the loss."""
    embed, blocks, mergings, last_norm, head = parameter_counts(config)
    stages = stage_shapes(config, image_size)
    batch, wide, norm = setup.batch_per_device, setup.compute_bytes, setup.norm_bytes
    pixels = batch * math.prod(image_size) * config.in_channels

    numbers = batch * stages[0].tokens * stages[0].dim
    # The images, once more as the projection takes them, channels last and in the products' precision; what is normalized.
    kept = pixels * (4 + wide) + numbers * norm
    steps = [Layer(embed, kept, forward=numbers * 2 * norm, backward=numbers * 2 * norm)]
    for index, (stage, sizes) in enumerate(zip(stages, blocks)):
        every = config.extra_norm_every if index == 2 else 0
        for block, parameters in enumerate(sizes):
            extra_norm = bool(every) and (block + 1) % every == 0
            steps.append(block_layer(stage, setup, parameters, extra_norm))
        if index < len(mergings):
            numbers = batch * stages[index + 1].tokens * stages[index + 1].dim
            # Four neighbors side by side, twice the numbers that come of them; what is normalized.
            kept = 2 * numbers * wide + numbers * norm + weight_copies(mergings[index], setup)
            steps.append(Layer(mergings[index], kept, forward=2 * numbers * norm, backward=4 * numbers * norm))
    numbers = batch * stages[-1].tokens * stages[-1].dim
    predicted = batch * stages[-1].tokens * config.in_channels * config.strides[-1] ** 2
    # What is normalized and what the decoder takes; each pixel's error, and which pixels are masked.
    kept = numbers * (norm + wide) + pixels * 4 * (1 + 1 / config.in_channels) + weight_copies(head, setup)
    steps.append(Layer(last_norm + head, kept, forward=predicted * wide + pixels * 4 * 2, backward=pixels * 4 * 2))
    return steps


# In what follows `wide` is the bytes of a number in matrix products, `norm` of one in norms and on the main path;
# `numbers` counts those of a batch's feature map, and `padded` those of its windows.


def block_layer(stage: StageShape, setup: Setup, parameters: int, extra_norm: bool) -> Layer:
    """One `SwinV2Block`. Attention and MLP are never at their fullest together, so what one needs for a moment is counted
    less what the other keeps."""
    wide, norm = setup.compute_bytes, setup.norm_bytes
    tokens = setup.batch_per_device * stage.tokens
    numbers, hidden = tokens * stage.dim, tokens * stage.hidden
    attention = attention_kept(stage, setup)
    # What the MLP takes, its hidden layer before and after GELU, what is normalized; means and deviations of both norms.
    mlp = numbers * wide + 2 * hidden * wide + numbers * norm + 4 * 4 * tokens
    kept = attention + mlp + (numbers * norm if extra_norm else 0)
    copies = weight_copies(4 * stage.dim**2 + 2 * stage.dim * stage.hidden, setup)

    attending, attending_back = attention_moments(stage, setup)
    forward = max(attending - mlp, 0) + 2 * numbers * norm
    # Either attention's gradients, or those of the MLP's hidden layer and of its two sides.
    backward = max(attending_back - mlp, hidden * wide + numbers * (norm + wide))
    gathered = 4 * parameters if setup.sharded else 0
    if setup.checkpoint_activations:
        # The forward pass drops what it would keep; at most attention's is there.
        return Layer(parameters, numbers * norm, copies, kept + copies, forward + attention, backward, gathered)
    return Layer(parameters, kept + copies, 0, 0, forward, backward, gathered)


def attention_weights(stage: StageShape, setup: Setup) -> int:
    """Bytes of all attention weights that are kept: in float32, and where that is not the products' precision in it too."""
    if setup.sequential_attention is not None:
        return 0
    pairs = setup.batch_per_device * stage.windows * stage.heads * stage.window_tokens**2
    return pairs * (4 if setup.compute_bytes == 4 else 4 + 2)


def attention_kept(stage: StageShape, setup: Setup) -> int:
    """Bytes that one windowed attention keeps for the backward pass."""
    wide, norm = setup.compute_bytes, setup.norm_bytes
    tokens = setup.batch_per_device * stage.padded
    padded = tokens * stage.dim
    # The windows, what proj takes, what is normalized, and of the position bias the hidden layer and the table.
    around = 2 * padded * wide + padded * norm + 4 * stage.offsets * (CPB_HIDDEN + stage.heads)
    if setup.sequential_attention is not None:
        return around + 3 * padded * wide  # queries, keys and values
    # Queries and keys in float32, which where that is the precision are views of one tensor with the values; both
    # normalized, the queries scaled, the keys turned for the product; a copy of the values; norms of queries and keys.
    inside = padded * ((3 if wide == 4 else 2) * 4 + 3 * 4 + wide) + 4 * 4 * tokens * stage.heads
    return around + inside + attention_weights(stage, setup)


def attention_moments(stage: StageShape, setup: Setup) -> tuple[float, float]:
    """Bytes that one windowed attention needs for a moment, forward and backward, besides what it keeps."""
    wide, norm = setup.compute_bytes, setup.norm_bytes
    windows, heads, pairs = setup.batch_per_device * stage.windows, stage.heads, stage.window_tokens**2
    numbers = setup.batch_per_device * stage.tokens * stage.dim
    if setup.sequential_attention is not None:
        windows = min(windows, setup.sequential_attention)
        heads = min(heads, max(PIECE_LOGITS // (windows * pairs), 1))
    logits = 4 * windows * heads * pairs
    # Logits without and with mask, or as weights too, and those in the products' precision; a window's bias.
    forward = (2 if wide == 4 else 2.5) * logits + 4 * heads * pairs - attention_weights(stage, setup)
    if setup.sequential_attention is None:
        # Gradients of weights and of logits; on the main path, and of what attention gives.
        return forward, 2 * logits + numbers * (norm + 2 * wide)
    # The weights again, and gradients of queries, keys and values, piece by piece and joined.
    return forward, 3 * logits + numbers * (norm + wide + 2 * 3 * wide)


def weight_copies(weights: int, setup: Setup) -> int:
    """Bytes of the copies that autocast makes of so many weights: under FSDP of whole ones, and they outlive those."""
    return 0 if setup.compute_bytes == 4 else 2 * weights


def cached_bytes(config: SwinV2Config, image_size: Size, setup: Setup) -> int:
    """Of what `simmim.encoders.swinv2` caches from step to step: coordinates and indices of windows, masks of stages."""
    total, windows = 0, set()
    for stage, depth in zip(stage_shapes(config, image_size), config.depths):
        if stage.window not in windows:
            windows.add(stage.window)
            total += 8 * stage.window_tokens**2 + 2 * 4 * stage.offsets
        if stage.shifts and depth > 1:
            mask = 0 if setup.sequential_attention is not None else 4 * stage.window_tokens
            total += stage.windows * stage.window_tokens * (8 + mask)
    return total


def memory(config: SwinV2Config, image_size: Size, setup: Setup) -> Memory:
    """What one device needs for a training step, walked through layer by layer, forward and back."""
    steps = layers(config, image_size, setup)
    devices = setup.devices if setup.sharded else 1
    parameters = math.ceil(4 * sum(step.parameters for step in steps) / devices)
    optimizer, exchange = 2 * parameters, 0 if setup.devices == 1 else parameters
    if setup.sharded:
        exchange = 4 * sum(step.parameters for step in steps if not step.gathered)  # whole throughout
    cached = cached_bytes(config, image_size, setup)
    always = parameters + optimizer + exchange + cached

    kept = casts = gradients = fullest = 0.0
    for step in steps:
        kept, casts = kept + step.kept, casts + step.cast
        # A block at work, and the next fetched ahead.
        fullest = max(fullest, kept + casts + step.forward + 2 * step.gathered)
    activations = cached + kept
    for step in reversed(steps):
        fullest = max(fullest, kept + step.rebuilt + step.backward + gradients + 2 * step.gathered)
        kept -= step.kept
        # Its gradient is there in the end, once more as it is sent.
        fullest = max(fullest, kept + gradients + 4 * step.gathered)
        gradients += 4 * step.parameters / devices
    fullest = max(fullest, gradients)  # when the optimizer steps
    exchange += 4 * max(step.gathered for step in steps)
    working = max(max(step.forward, step.rebuilt + step.backward) for step in steps)
    peak = always + fullest
    return Memory(parameters, parameters, optimizer, exchange, round(activations), round(working), round(peak))


# --- what to turn on ----------------------------------------------------------------------------------------------------


def plan(
    config: SwinV2Config,
    image_size: int | Size,
    devices: int = 1,
    batch_per_device: int = 1,
    precision: str = "bf16-mixed",
    strategy: str = "ddp",
    checkpoint_activations: bool = False,
    sequential_attention: int | None = None,
    device_memory_gib: float = 80.0,
    device: str = "cuda",
    title: str = "encoder",
) -> Plan:
    """What pre-training this encoder needs of each device as asked, and with what turned on it fits.

    Args:
        image_size: pixels, one number or height and width.
        device_memory_gib: what a device has, of which `USABLE_SHARE` is planned for.
        title: what to call the model.
        devices, batch_per_device, precision, strategy, checkpoint_activations, sequential_attention, device: as in
            `Setup`.

    Raises:
        ValueError: for a setting out of range.
    """
    size = as_pair(image_size)
    if min(size) < 1 or device_memory_gib <= 0:
        raise ValueError(f"image size {size} px and {device_memory_gib} GiB of memory: give positive numbers")
    asked = Setup(batch_per_device, devices, precision, strategy, checkpoint_activations, sequential_attention, device)
    usable = device_memory_gib * USABLE_SHARE * GIB

    def fits(setup: Setup) -> bool:
        return memory(config, size, setup).peak <= usable

    setups = with_more_turned_on(config, size, asked)
    recommended = next(filter(fits, setups), None)
    largest = largest_batch(recommended or setups[-1], fits)
    if recommended is None and largest:
        recommended = replace(setups[-1], batch_per_device=largest)
    embed, blocks, mergings, last_norm, head = parameter_counts(config)
    encoder = embed + sum(map(sum, blocks)) + sum(mergings) + last_norm
    return Plan(
        title,
        config,
        size,
        device_memory_gib,
        encoder,
        head,
        *flops(config, size, asked),
        asked,
        memory(config, size, asked),
        recommended,
        recommended and memory(config, size, recommended),
        largest,
    )


def plan_for(
    preset: str,
    image: int | Size,
    devices: int = 1,
    batch: int | None = None,
    precision: str = "bf16-mixed",
    device_memory_gib: float = 80.0,
    window: int | None = None,
    **more,
) -> Plan:
    """`plan` of a preset, with what `simmim pretrain` would choose where nothing is said.

    Args:
        image: pixels, one number or height and width.
        batch: images an optimizer step, over all devices.
        window: side in tokens; by default a quarter of the first stage's map.
        more: further arguments of `plan`.

    Raises:
        ValueError: for an unknown preset, naming the nearest known one; for a setting out of range.
    """
    size = as_pair(image)
    config = SwinV2Config.from_preset(preset)
    if min(size) < config.patch_size:
        raise ValueError(f"image size is {size[0]}×{size[1]} px: give at least a patch of {config.patch_size} px")
    default_mask_unit(size, config.patch_size)  # refuses what pre-training would
    config = replace(config, window_size=window or default_window(min(size), config.patch_size))
    if devices < 1:
        raise ValueError(f"devices is {devices}: give 1 or more")
    batch = default_batch_size("cuda", preset in ("nano", "micro")) if batch is None else batch
    return plan(
        config,
        size,
        devices,
        math.ceil(batch / devices),
        precision,
        device_memory_gib=device_memory_gib,
        title=preset,
        **more,
    )


def with_more_turned_on(config: SwinV2Config, image_size: Size, asked: Setup) -> list[Setup]:
    """The setup as asked, then with more and more turned on: activation checkpoints, which cost a third more time; FSDP,
    traffic between devices; sequential attention, time again; these two together."""
    largest = max(stage.heads * stage.window_tokens**2 for stage in stage_shapes(config, image_size))
    checkpointed = replace(asked, checkpoint_activations=True)
    spread = replace(checkpointed, strategy="fsdp" if asked.devices > 1 else asked.strategy)
    sequential = {"sequential_attention": asked.sequential_attention or max(PIECE_LOGITS // largest, 1)}
    return [asked, checkpointed, spread, replace(checkpointed, **sequential), replace(spread, **sequential)]


def largest_batch(setup: Setup, fits: Callable[[Setup], bool], limit: int = 2**16) -> int:
    """Images a device that still fit; 0 where not one does."""
    low, high = 0, 1
    while high <= limit and fits(replace(setup, batch_per_device=high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(replace(setup, batch_per_device=middle)) else (low, middle)
    return low


# --- the table ----------------------------------------------------------------------------------------------------------


def render(plan: Plan) -> str:
    """The plan as a table, with units."""
    sides = [(plan.asked, plan.memory)]
    if plan.recommended is not None and plan.recommended != plan.asked:
        sides.append((plan.recommended, plan.recommended_memory))
    usable = plan.device_memory_gib * USABLE_SHARE
    rows = [("", ["as asked", "recommended"])]
    rows += [
        (name, [tell(setup) for setup, _ in sides])
        for name, tell in {
            "images a device": lambda setup: f"{setup.batch_per_device:,}",
            "images an optimizer step": lambda setup: f"{setup.batch_per_device * setup.devices:,}",
            "strategy": lambda setup: setup.strategy if setup.devices > 1 else "one device",
            "checkpoint_activations": lambda setup: "on" if setup.checkpoint_activations else "off",
            "sequential_attention": lambda setup: (
                "off" if setup.sequential_attention is None else f"{setup.sequential_attention} at once"
            ),
        }.items()
    ]
    rows.append(("memory of a device, GiB", []))
    rows += [
        (f"  {name}", [f"{getattr(memory, field) / GIB:,.2f}" for _, memory in sides])
        for field, name in {
            "parameters": "parameters",
            "gradients": "gradients",
            "optimizer": "optimizer state",
            "exchange": "exchange between devices",
            "activations": "activations kept",
            "working": "working memory",
            "peak": "most at one time",
        }.items()
    ]
    rows.append(
        (
            f"  fits in {usable:,.1f} of {plan.device_memory_gib:g}",
            ["yes" if memory.peak <= usable * GIB else "no" for _, memory in sides],
        )
    )
    head = [
        f"{plan.title}, {plan.image_size[0]} × {plan.image_size[1]} px, window {plan.config.window_size}, "
        f"{plan.asked.precision}, {plan.asked.devices} device{'s' if plan.asked.devices > 1 else ''}",
        f"{plan.encoder_parameters / 1e6:,.1f} M parameters in the encoder, {plan.head_parameters / 1e6:,.2f} M in the head",
        f"{plan.forward_flops / 1e9:,.1f} GFLOPs an image forward, {plan.training_flops / 1e9:,.1f} in training as asked",
        "",
    ]
    table = [f"{name:<28}" + "".join(f"{cell:>14}" for cell in cells[: len(sides)]) for name, cells in rows]
    return "\n".join([*head, *(line.rstrip() for line in table), "", advice(plan)])


def advice(plan: Plan) -> str:
    """What to do, in a sentence or two."""
    if plan.recommended is None:
        return "Not even one image a device fits: give a smaller model or image, a smaller window, or more devices."
    asked, recommended, steps = plan.asked, plan.recommended, []
    if recommended.checkpoint_activations and not asked.checkpoint_activations:
        steps.append("checkpoint_activations")
    if recommended.strategy != asked.strategy:
        steps.append("fsdp")
    if recommended.sequential_attention and asked.sequential_attention is None:
        steps.append(f"sequential_attention {recommended.sequential_attention}")
    if recommended.batch_per_device < asked.batch_per_device:
        steps.append(f"a batch of {recommended.batch_per_device * recommended.devices:,}")
    what = "It fits as asked." if not steps else f"To fit, use {', '.join(steps)}."
    most = plan.largest_batch
    return f"{what} The largest batch that then fits: {most:,} images a device, {most * asked.devices:,} in all."
