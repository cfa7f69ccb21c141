"""Recognises what a file is, and loads it."""

from __future__ import annotations

import pickle
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lmkan_deploy import upstream
from lmkan_deploy.checkpoints.architecture import Architecture, ended
from lmkan_deploy.checkpoints.exported_program import (
    archive_names,
    is_exported_program,
    load_exported_program,
)
from lmkan_deploy.checkpoints.state_dict import build_stack, fill, one_line, unwrap
from lmkan_deploy.errors import CheckpointError
from lmkan_deploy.nn import LMKAN2DLayer
from lmkan_deploy.spec import MIN_NUM_GRIDS, grid_points
from lmkan_deploy.staging import file_sha256

Kind = Literal["state dict", "inferred stack", "exported program", "pickled module"]


@dataclass(frozen=True)
class Checkpoint:
    """A network out of a file.

    Attributes:
        path: The file.
        kind: What the file was.
        module: The network, in eval mode, on the CPU.
        weights_only: Whether the file was read as tensors and structure alone. A trusted one may have run code.
        program: For an exported program, the program itself; `module` then runs it.
        notes: What a user should know about how it was loaded, a line each.
    """

    path: Path
    kind: Kind
    module: nn.Module
    weights_only: bool
    program: torch.export.ExportedProgram | None = None
    notes: list[str] = field(default_factory=list)

    def sha256(self) -> str:
        """Hash of the file."""
        return file_sha256(self.path)


def load_checkpoint(
    path: str | Path,
    architecture: Architecture | None = None,
    *,
    trust_pickle: bool = False,
    key: str | None = None,
) -> Checkpoint:
    """Loads a network from a state dict, a `torch.export` archive, or a pickled module.

    Nothing in the file is executed unless `trust_pickle` is set; the code of `architecture` is the
    caller's own and does run.

    Args:
        path: The file.
        architecture: Builds the network of a state dict. Not needed for a plain stack of lookup and
            BatchNorm layers, nor for the other kinds (its folder helps a pickle to find its classes).
        trust_pickle: Whether a file may run code while it is loaded.
        key: Which network, where a training script saved several in a dict: `ema`, or `state.ema`.

    Raises:
        CheckpointError: The file can't be read, needs trust, or does not fit the architecture; or the
            network's tables are damaged.
    """
    path = Path(path)
    architecture = architecture or Architecture()
    _check_file(path)
    if is_exported_program(path):
        if key is not None:
            raise CheckpointError(
                f"expected a file of several networks with --key, found the archive {path}; leave out --key"
            )
        program = load_exported_program(path, trust=trust_pickle)
        checkpoint = Checkpoint(path, "exported program", program.module(), not trust_pickle, program)
    else:
        content, weights_only = _load_content(path, architecture, trust_pickle)
        checkpoint = _from_content(path, content, weights_only, architecture, key)
    _check_values(checkpoint)
    return checkpoint


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"expected a checkpoint file, found the folder {path}; pass a file of it")
    if not path.is_file():
        raise CheckpointError(f"expected a checkpoint file, found no file {path}; check the path")
    if path.stat().st_size == 0:
        raise CheckpointError(
            f"expected a checkpoint, found the empty file {path}; copy it again, or save it again"
        )


def _load_content(path: Path, architecture: Architecture, trust_pickle: bool) -> tuple[Any, bool]:
    """What the file holds, and whether it was read as weights only."""
    names = archive_names(path)
    if any(name.endswith("constants.pkl") for name in names):
        raise CheckpointError(
            f"expected a state dict, a torch.export archive or a pickled module, found the TorchScript "
            f"archive {path}; save model.state_dict() instead"
        )
    if not _starts_with(path, b"PK", pickle.PROTO):
        if path.suffix == ".onnx" or _starts_with(path, *_ONNX_BEGINNINGS):
            raise CheckpointError(
                f"expected a PyTorch checkpoint, found {path}, which is an ONNX file: run lmkan-deploy optimize"
            )
        raise CheckpointError(
            f"expected a PyTorch checkpoint, found {path}, which is neither a zip archive nor a pickle; pass "
            "what torch.save or torch.export.save wrote"
        )
    try:
        with warnings.catch_warnings():
            # About pickles of newer protocols, which the loader refuses.
            warnings.simplefilter("ignore", UserWarning)
            # Tensors of a zip file stay on disk until they are used.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=bool(names)), True
    except pickle.UnpicklingError as error:
        if not names and not _starts_with(path, pickle.PROTO):
            raise _unreadable(path, error) from error
        if not trust_pickle:
            raise CheckpointError(
                f"expected a file of tensors alone, found pickled Python objects in {path}; loading them runs "
                "code from the file: pass --trust-pickle if you trust its origin, or save "
                "model.state_dict() and pass --arch"
            ) from error
    except Exception as error:  # PyTorch raises whatever its many parsers raise
        raise _unreadable(path, error) from error
    return _load_pickle(path, architecture), False


_ONNX_BEGINNINGS = [bytes([8, version, tag]) for version in range(3, 32) for tag in (0x12, 0x3A, 0x42)]
"""The field with the format's version, and the tag of what comes next: the producer, the graph or the opsets."""


def _starts_with(path: Path, *beginnings: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(max(map(len, beginnings))).startswith(beginnings)


def _load_pickle(path: Path, architecture: Architecture) -> Any:
    with architecture.importable():
        try:
            return torch.load(path, map_location="cpu", weights_only=False)
        except (ImportError, AttributeError) as error:
            hint = (
                "it was saved from a script, whose classes have no module to import: save "
                "model.state_dict() and pass --arch"
                if "__main__" in str(error)
                else "pass the folder of the code that saved it with --arch-path"
            )
            raise CheckpointError(f"could not unpickle {path}: {error}; {hint}") from error
        except SystemExit as error:
            raise ended(f"the code that {path} refers to", error) from error
        except Exception as error:  # the pickle's own code may raise anything
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    # PyTorch adds what it guesses, which is no help to those who only have the file.
    reason = re.split(r"\. This is an internal miniz error|\s*\(Could this error", one_line(error))[0][:200]
    return CheckpointError(
        f"expected a PyTorch checkpoint, could not read {path}: {reason}; the file is truncated, damaged or "
        "of another format: copy it again, or save it again"
    )


def _from_content(
    path: Path, content: Any, weights_only: bool, architecture: Architecture, key: str | None
) -> Checkpoint:
    state = unwrap(content, path, key)
    if isinstance(state, nn.Module):
        return Checkpoint(path, "pickled module", _prepare(_unwrapped(state)), weights_only)
    if architecture.factory is not None:
        module = _unwrapped(architecture.build())
        notes = fill(module, state, architecture.factory)
        return Checkpoint(path, "state dict", _prepare(module), weights_only, notes=notes)
    notes = ["assumed no layers without weights, such as activations, which a state dict does not show"]
    module = build_stack(state)
    if any(isinstance(layer, nn.BatchNorm1d) for layer in module):
        notes.append("assumed BatchNorm's default eps of 1e-5, which a state dict does not hold")
    if any(value.dtype == torch.float64 for value in state.values()):
        notes.append("converted the weights from float64 to float32")
    return Checkpoint(path, "inferred stack", _prepare(module), weights_only, notes=notes)


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network inside of what trains, averages or compiles it, whose forward hides the network's inputs."""
    while True:
        if any(type(module).forward is wrapper.forward for wrapper in _WRAPPERS):
            module = module.module  # type: ignore[assignment]
        elif type(module).__name__ == "OptimizedModule":  # torch.compile's; its import takes a second
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def _prepare(module: nn.Module) -> nn.Module:
    module = upstream.replace_layers(module).eval()
    for layer in module.modules():
        if isinstance(layer, LMKAN2DLayer):
            parameter = layer.func_parameter
            parameter.data = parameter.data.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    return module


def _check_values(checkpoint: Checkpoint) -> None:
    """Refuses weights that no runtime could compute with, and grids that are not the operator's."""
    module = checkpoint.module
    state = module.state_dict()
    # Other buffers may well hold infinities, such as masks.
    statistics = {key: v for key, v in state.items() if key.split(".")[-1] in ("running_mean", "running_var")}
    tables = {key: v for key, v in state.items() if key.split(".")[-1] == "func_parameter"}
    for key, value in (dict(module.named_parameters()) | statistics | tables).items():
        if not value.dtype.is_floating_point or value.dtype.itemsize == 1:
            continue
        only_nan = key not in statistics and _may_be_infinite(module, key)
        wrong = value.isnan() if only_nan else ~value.isfinite()
        if wrong.any():
            what, found = ("numbers", "NaN") if only_nan else ("finite values", "NaN or infinite ones")
            raise CheckpointError(
                f"expected {what} in {key}, found {int(wrong.sum())} {found} in {checkpoint.path}; "
                "the training diverged: use an earlier checkpoint"
            )
        if key.endswith("running_var") and (value < 0).any():
            raise CheckpointError(
                f"expected variances of at least 0 in {key}, found {float(value.min()):g} in {checkpoint.path}; "
                "use an earlier checkpoint"
            )
    for key, table in tables.items():
        num_grids = table.shape[0] - 1
        if num_grids < MIN_NUM_GRIDS:
            raise CheckpointError(
                f"expected a grid of at least {MIN_NUM_GRIDS} cells in {key}, found {num_grids}; train with a "
                "finer grid"
            )
        borders = state.get(key.removesuffix("func_parameter") + "borders")
        expected = torch.from_numpy(grid_points(num_grids))
        if borders is not None and not (
            borders.shape == expected.shape
            and torch.allclose(borders.double(), expected, rtol=1e-2, atol=1e-3)
        ):
            raise CheckpointError(
                f"expected the operator's grid of {num_grids} cells in {key.removesuffix('func_parameter')}"
                "borders, found other points; tables trained on another grid can't be exported: train with "
                "upstream's"
            )


def _may_be_infinite(module: nn.Module, key: str) -> bool:
    """Whether a parameter may be a mask: one of the user's own classes, and no table."""
    prefix, _, name = key.rpartition(".")
    owner = module.get_submodule(prefix)
    # Programs keep all of theirs in plain modules.
    is_users = type(owner) is nn.Module or not type(owner).__module__.startswith("torch.nn.")
    return is_users and not isinstance(owner, LMKAN2DLayer) and not name.startswith("func_parameter")
