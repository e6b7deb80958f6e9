"""Reading and writing model weights: .pt checkpoints, .wts and .safetensors files."""

from yolotrt.weights.model import Metadata, Weights

__all__ = ["Metadata", "Weights"]
