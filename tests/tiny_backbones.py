"""Tiny networks of timm and transformers with random weights, in folders as these libraries save them."""

import sys

import torch

SIDE_PX = 64
VIT = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 64, "image_size": SIDE_PX}
VIT |= {"patch_size": 8}
SWIN = {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4, "image_size": SIDE_PX}
SWIN |= {"layer_norm_eps": 1e-6}  # as published it is an encoder of this toolkit
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}

# Name to model type and fields of the configuration.
TRANSFORMERS = {
    "vit": ("vit", VIT),
    "mae": ("vit_mae", {**VIT, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}),
    "dinov2": ("dinov2", VIT),
    "dinov3": ("dinov3_vit", VIT),
    "clip": ("clip", {"vision_config": VIT, "text_config": {**VIT, "vocab_size": 9}, "projection_dim": 8}),
    "siglip": ("siglip", {"vision_config": VIT, "text_config": {**VIT, "vocab_size": 9}}),
    "swin": ("swin", SWIN),
    "convnext": ("convnext", STAGES),
    "resnet": ("resnet", {**STAGES, "embedding_size": 8, "layer_type": "basic"}),
}
# Name to timm's name and its arguments.
TIMM = {
    "timm vit": ("vit_tiny_patch16_224", {"img_size": SIDE_PX, "embed_dim": 32, "depth": 5, "num_heads": 2}),
    "timm dinov3": ("vit_small_patch16_dinov3", {"img_size": SIDE_PX, "embed_dim": 32, "depth": 4, "num_heads": 2}),
    "timm swin": (
        "swin_s3_tiny_224",  # the published ones are encoders of this toolkit
        {"img_size": SIDE_PX, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
    ),
    "timm convnext": ("convnext_atto", {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}),
    "timm resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}),
}
NAMES = (*TRANSFORMERS, *TIMM)


def import_timm():
    """timm, without a torchvision if none is installed, and without traces of the stubs that take its place.

    torchmetrics looks for torchvision when it is imported: it is before.
    """
    import torchmetrics  # noqa: F401
    from timm_stub import stub_torchvision

    if "timm" in sys.modules:
        return sys.modules["timm"]
    try:
        import timm
    except ImportError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
            del sys.modules[name]
        stub_torchvision()
        try:
            import timm
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
    return timm


@torch.no_grad()
def randomized(network, seed=0):
    """Every parameter random: the libraries leave some at zero, which hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network.eval()


def network_of(name):
    """A network of its library, the whole model where the library saves one with other parts."""
    torch.manual_seed(0)
    if name in TIMM:
        architecture, arguments = TIMM[name]
        return randomized(import_timm().create_model(architecture, num_classes=3, **arguments))
    import transformers

    model_type, fields = TRANSFORMERS[name]
    config = transformers.AutoConfig.for_model(model_type, **fields)
    kind = transformers.AutoModelForPreTraining if name == "mae" else transformers.AutoModel
    return randomized(kind.from_config(config))


def save(name, folder):
    """Save a network as its library does, and return it."""
    network = network_of(name)
    if name in TIMM:
        timm = import_timm()
        timm.models.save_for_hf(network, folder, model_args=TIMM[name][1], safe_serialization=True)
        (folder / "pytorch_model.bin").unlink(missing_ok=True)
    else:
        network.save_pretrained(folder)
    return network
