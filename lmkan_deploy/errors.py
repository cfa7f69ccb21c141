"""Errors that a user can act on: the message says what was expected, what was found, what to do."""

from __future__ import annotations


class LmkanError(Exception):
    """Base of the package's errors. The command line prints the message alone and exits with code 2."""


class CheckpointError(LmkanError):
    """A checkpoint can't be read, or can't become a model."""


class ExportError(LmkanError):
    """A model can't be expressed in ONNX."""


class ModelError(LmkanError):
    """A file can't be read, written or run, or is not what an operation needs."""


class EngineError(LmkanError):
    """A TensorRT engine can't be built, or does not fit this machine."""


class LibraryError(LmkanError):
    """A native library is missing or of another release."""


class InputError(LmkanError):
    """Arrays don't fit a model's inputs."""


class VerificationError(LmkanError):
    """Outputs differ by more than the tolerance."""
