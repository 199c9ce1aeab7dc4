"""Runs timm in a separate process: `python timm_stub.py JOBS.json` imports timm without torchvision and runs a list of jobs.

timm imports names from torchvision that its Swin V2 models never use. There may be no build of torchvision for the installed
torch, so that stubs take its place. In the test process they would break torchmetrics, which looks for torchvision too.
"""

import enum
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class InterpolationMode(enum.Enum):
    """The members of torchvision's enum that timm's tables name."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class Stub(types.ModuleType):
    """A module whose every attribute is an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return InterpolationMode if name == "InterpolationMode" else type(name, (), {})


def stub_torchvision():
    """Put stubs of the modules that timm imports into sys.modules."""
    for name in (
        *("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets"),
        *("torchvision.ops", "torchvision.ops.misc", "torchvision.models", "torchvision.models.feature_extraction"),
        "torchvision.utils",
    ):
        module = Stub(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        sys.modules[name] = module


def write(results, path):
    """Save tensors as safetensors, copied because the format refuses shared storage."""
    save_file({name: value.clone().contiguous() for name, value in results.items()}, path)


@torch.inference_mode()
def outputs(model, images):
    """Pooled features, each stage's feature map before merging, and the logits of a head, in the encoder's layout; of Beit
    the tokens of patches after the last block and its norm if it has one."""
    if hasattr(model, "blocks"):  # Beit
        tokens = model.forward_features(images)
        results = {"tokens": tokens[:, 1:], "pooled": model.forward_head(tokens, pre_logits=True)}
        return results | ({"logits": model.forward_head(tokens)} if model.num_classes else {})
    maps = []
    hooks = [layer.register_forward_hook(lambda *call: maps.append(call[2].movedim(-1, 1))) for layer in model.layers]
    features = model.forward_features(images)
    for hook in hooks:
        hook.remove()
    results = {f"stage{i}": stage for i, stage in enumerate(maps)} | {
        "pooled": model.forward_head(features, pre_logits=True)
    }
    if model.num_classes:
        results["logits"] = model.forward_head(features)
    return results


def save(timm, job):
    """Save a random model with timm, as a folder or as a bare state dict, and its outputs in each of the job's dtypes."""
    from random_encoders import randomize, without_draws

    with without_draws():
        model = timm.create_model(job["name"], **job["arguments"])
    randomize(model).eval()
    if "resized" in job:
        model.set_input_size(job["resized"])
    if "file" in job:
        torch.save(model.state_dict(), job["file"])
    else:
        timm.models.save_for_hf(model, job["folder"], safe_serialization=True)
    results = {}
    for dtype in job["dtypes"]:
        model = model.to(getattr(torch, dtype))
        images = load_file(job["images"])["images"].to(getattr(torch, dtype))
        results |= {f"{dtype}.{name}": value for name, value in outputs(model, images).items()}
    write(results, job["out"])


@torch.inference_mode()
def load(timm, job):
    """Load an exported folder in timm's three ways: the weights strictly, the folder, and with `features_only`."""
    images, folder = load_file(job["images"])["images"], job["folder"]
    description = json.loads((Path(folder) / "config.json").read_text())
    classes = description["num_classes"]
    bare = timm.create_model(
        description["architecture"],
        checkpoint_path=f"{folder}/model.safetensors",
        num_classes=classes,
        **description["model_args"],
    )
    whole = timm.create_model(f"local-dir:{folder}", pretrained=True)
    results = {
        f"{way}.{name}": value
        for way, model in (("bare", bare), ("whole", whole))
        for name, value in outputs(model.eval(), images).items()
    }
    if not hasattr(whole, "blocks"):
        maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
        for stage, value in enumerate(maps.eval()(images)):
            results[f"maps.stage{stage}"] = value.movedim(-1, 1)
        results["channels"], results["strides"] = map(
            torch.tensor, (maps.feature_info.channels(), maps.feature_info.reduction())
        )
    settings = timm.data.resolve_model_data_config(whole)
    results["mean"], results["std"], results["size"] = (torch.tensor(settings[key]) for key in ("mean", "std", "input_size"))
    write(results, job["out"])


def run(timm, job):
    """Execute the printed loading code and save the outputs of the `model` that it defines."""
    namespace = {}
    exec(job["code"], namespace)
    write(outputs(namespace["model"].eval(), load_file(job["images"])["images"]), job["out"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    stub_torchvision()
    import timm

    for job in json.loads(Path(sys.argv[1]).read_text()):
        {"save": save, "load": load, "run": run}[job["do"]](timm, job)
