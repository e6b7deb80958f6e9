"""Every error that yolotrt raises on purpose.

A message is one line of the form ``what was wrong: what to do``. The command line prints it after ``yolotrt: error:``
and exits with the error's `exit_status`.
"""

from __future__ import annotations


class YolotrtError(Exception):
    """Base of all errors that yolotrt raises on purpose."""

    exit_status = 1


class InputError(YolotrtError):
    """A file, picture or option that the user gave cannot be used."""

    exit_status = 2


class CheckpointError(InputError):
    """A PyTorch checkpoint cannot be read, or holds something that the restricted reader refuses."""


class WeightsError(InputError):
    """A .wts or .safetensors file is malformed, or its tensors do not fit its graph."""


class GraphError(InputError):
    """A model graph (the checkpoint's yaml) is malformed or names an unknown block."""


class NetworkError(YolotrtError):
    """A network definition is wrong; raised at the faulty call and names the layer."""


class BuildError(YolotrtError):
    """A backend could not build an engine."""


class InferenceError(YolotrtError):
    """A library failed while it ran an engine."""


class EngineFileError(InputError):
    """An engine file is not one of ours, damaged, or made for another machine or library version."""


class BackendUnavailableError(YolotrtError):
    """The library or device that a backend needs is not there."""


class ImageError(InputError):
    """A picture cannot be read."""


class VideoError(InputError):
    """A video, camera or stream cannot be read, or ends too early."""


class OutputError(YolotrtError):
    """A result cannot be written."""

    exit_status = 2
