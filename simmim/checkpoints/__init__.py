"""Encoders from and to other formats: the authors' checkpoints, timm, transformers, ONNX."""

from simmim.checkpoints.reading import load_encoder, read, read_encoder

__all__ = ["load_encoder", "read", "read_encoder"]
