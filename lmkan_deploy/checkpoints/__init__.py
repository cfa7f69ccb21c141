"""Saved models -> PyTorch modules that are ready to export, without running code from the file."""

from lmkan_deploy.checkpoints.architecture import Architecture
from lmkan_deploy.checkpoints.load import Checkpoint, load_checkpoint

__all__ = ["Architecture", "Checkpoint", "load_checkpoint"]
