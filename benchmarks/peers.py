"""SimCLR or DINO of lightly on a ResNet-18 for some minutes of one core, as a folder that timm and this toolkit load.

    pip install lightly timm        # in an environment of its own: it brings torchvision
    OMP_NUM_THREADS=1 python benchmarks/peers.py --method simclr --data FOLDER --image-size 96 --minutes 21 --out simclr
    simmim study --init runs/photos --against simclr --data labeled ...

Transforms, heads and losses are lightly's, optimizers and rates those of its examples (SGD with 0.06 at a batch of 256, Adam
with 1e-3). With --bf16 the networks compute in bfloat16 and channels last, as this toolkit's do, which is faster where the
processor has instructions for it; losses are in float32. The length follows from the time that the first steps take, loading
included, so that the learning rate ends with the run.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import timm
import torch
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import DINOProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import DINOTransform, SimCLRTransform
from lightly.utils.scheduler import cosine_schedule
from PIL import Image
from safetensors.torch import save_file
from torch import nn

CALIBRATION_STEPS = 16


class SimCLR(nn.Module):
    """Two views of an image agree, all others of the batch do not."""

    def __init__(self, backbone: nn.Module, image_size: int):
        super().__init__()
        self.backbone, self.head, self.loss = backbone, SimCLRProjectionHead(512, 512, 128), NTXentLoss(0.5)
        self.transform = SimCLRTransform(image_size)

    def forward(self, views: list[torch.Tensor], progress: float) -> torch.Tensor:
        """The loss of a batch of two views."""
        first, second = (self.head(self.backbone(view)) for view in views)
        with torch.autocast("cpu", enabled=False):
            return self.loss(first.float(), second.float())

    def after_step(self, progress: float) -> None:
        """Nothing to do."""


class DINO(nn.Module):
    """A student that sees crops agrees with its moving average that sees two large ones."""

    def __init__(self, backbone: nn.Module, image_size: int):
        super().__init__()
        self.backbone, self.head = backbone, DINOProjectionHead(512, 512, 64, 2048, freeze_last_layer=1)
        self.teacher = timm.create_model("resnet18", num_classes=0)
        self.teacher.load_state_dict(backbone.state_dict(), strict=False)
        self.teacher_head = DINOProjectionHead(512, 512, 64, 2048)
        deactivate_requires_grad(self.teacher)
        deactivate_requires_grad(self.teacher_head)
        self.loss = DINOLoss(2048, warmup_teacher_temp_epochs=5)
        local = max(image_size * 3 // 7 // 32 * 32, 32)
        self.transform = DINOTransform(global_crop_size=image_size, local_crop_size=local, n_local_views=4)

    def forward(self, views: list[torch.Tensor], progress: float) -> torch.Tensor:
        """The loss of a batch of two large views and the small ones."""
        with torch.no_grad():
            targets = [self.teacher_head(self.teacher(view)).float() for view in views[:2]]
        predictions = [self.head(self.backbone(view)).float() for view in views]
        with torch.autocast("cpu", enabled=False):
            return self.loss(targets, predictions, epoch=int(100 * progress))

    def after_step(self, progress: float) -> None:
        """The teacher follows."""
        momentum = cosine_schedule(round(1000 * progress), 1001, 0.996, 1.0)
        update_momentum(self.backbone, self.teacher, momentum)
        update_momentum(self.head, self.teacher_head, momentum)


def batches(images: list[bytes], transform, batch_size: int, generator: np.random.Generator):
    """Views of all images in random order, epoch by epoch, without end."""
    while True:
        order = generator.permutation(len(images))
        for first in range(0, len(order) - batch_size + 1, batch_size):
            chosen = [Image.open(io.BytesIO(images[i])).convert("RGB") for i in order[first : first + batch_size]]
            yield [torch.stack(views) for views in zip(*(transform(image) for image in chosen), strict=True)]


def optimizer_for(model: nn.Module, lr: float | None, batch_size: int) -> torch.optim.Optimizer:
    """The optimizer of lightly's example for a method, with its rate where none is given."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(model, DINO):
        return torch.optim.Adam(trained, lr or 1e-3)
    return torch.optim.SGD(trained, lr or 0.06 * batch_size / 256, momentum=0.9, weight_decay=5e-4)


def train(model: nn.Module, stream, minutes: float, optimizer: torch.optim.Optimizer, bf16: bool) -> int:
    """Train for some minutes of processor time; the number of steps."""
    lr = optimizer.param_groups[0]["lr"]
    started, step, num_steps = time.process_time(), 0, 10**9
    while step < num_steps:
        progress = step / num_steps
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * progress))
        views = [view.contiguous(memory_format=torch.channels_last) if bf16 else view for view in next(stream)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(views, progress)
        optimizer.zero_grad()
        loss.backward()
        if isinstance(model, DINO):
            model.head.cancel_last_layer_gradients(int(100 * progress))
        optimizer.step()
        model.after_step(progress)
        step += 1
        if step == 4:
            started_steady = time.process_time()
        if step == 4 + CALIBRATION_STEPS:
            per_step = (time.process_time() - started_steady) / CALIBRATION_STEPS
            num_steps = int((60 * minutes - (time.process_time() - started)) / per_step) + step
        if step % 200 == 0:
            print(f"{step}/{num_steps} loss {loss.item():.3f} {(time.process_time() - started) / 60:.1f} min", flush=True)
    return step


def main() -> None:
    """Train, and write the backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("simclr", "dino"), required=True)
    parser.add_argument("--data", type=Path, required=True, help="a folder of images")
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of one core")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, help="peak learning rate, by default that of lightly's example")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 and channels last")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    images = [file.read_bytes() for file in sorted(options.data.rglob("*.*"))]
    backbone = timm.create_model("resnet18", num_classes=0)
    model = {"simclr": SimCLR, "dino": DINO}[options.method](backbone, options.image_size)
    if options.bf16:
        model = model.to(memory_format=torch.channels_last)
    generator = np.random.default_rng(options.seed)
    stream = batches(images, model.transform, options.batch_size, generator)
    steps = train(model, stream, options.minutes, optimizer_for(model, options.lr, options.batch_size), options.bf16)
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    save_file(weights, options.out / "model.safetensors")
    size = [3, options.image_size, options.image_size]
    preprocessing = {"input_size": size, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "num_classes": 0}
    config = {"architecture": "resnet18", "num_classes": 0, "num_features": 512, "pretrained_cfg": preprocessing}
    (options.out / "config.json").write_text(json.dumps(config, indent=2))
    print(f"{steps} steps")


if __name__ == "__main__":
    main()
