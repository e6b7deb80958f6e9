"""YOLOv5 on TensorRT, in Python."""

__version__ = "0.1.0"
