"""Methane molecules with displaced atoms, and their energies by GFN2-xTB.

GFN2-xTB (package `tblite`) is a semi-empirical method of quantum chemistry: it takes half a millisecond a
molecule, so the data set is computed here and not downloaded.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NUMBERS = np.array([6, 1, 1, 1, 1])
"""Atomic numbers: C, then four H."""

_BOND_LENGTH = 1.087
_CORNERS = np.array([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
REFERENCE_POSITIONS = _CORNERS * (_BOND_LENGTH / math.sqrt(3))
"""The tetrahedron that is displaced, [5, 3], in Ångström."""

DISPLACEMENT = 0.05
"""Standard deviation of every coordinate's displacement, in Ångström."""

TRAIN_SIZE, TEST_SIZE = 32_000, 4_000

_SEED = 2025
_CHUNK = 500
_BOHR = 0.529177210903
_HARTREE_IN_EV = 27.211386245988

Advance = Callable[[int, int], None]
"""Called with the number of molecules done and their total."""


@dataclass(frozen=True)
class Molecules:
    """Inputs and targets.

    Attributes:
        positions: [N, 5, 3] float32, in Ångström.
        energies: [N] float32, in eV, relative to the undisplaced molecule.
    """

    positions: NDArray[np.float32]
    energies: NDArray[np.float32]


def load_molecules(cache: Path, advance: Advance = lambda done, total: None) -> tuple[Molecules, Molecules]:
    """The training set and the test set, from the cache where it holds exactly these.

    Args:
        cache: An .npz file; it is written where it is absent, incomplete or made with other settings.
        advance: Reports the progress of a generation; not called when the cache is used.
    """
    content = _read_cache(cache)
    if content is None:
        content = _generate(advance)
        _write_cache(cache, content)
    split = (slice(TRAIN_SIZE), slice(TRAIN_SIZE, None))
    train, test = (Molecules(content.positions[part], content.energies[part]) for part in split)
    return train, test


def _settings() -> str:
    """Everything the data depend on."""
    return json.dumps(
        {
            "size": TRAIN_SIZE + TEST_SIZE,
            "displacement": DISPLACEMENT,
            "reference": REFERENCE_POSITIONS.tolist(),
            "seed": _SEED,
            "chunk": _CHUNK,
            "tblite": importlib.metadata.version("tblite"),
        }
    )


def _read_cache(path: Path) -> Molecules | None:
    try:
        with np.load(path) as content:
            if str(content["settings"]) != _settings():
                return None
            return _checked(Molecules(content["positions"], content["energies"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent, damaged, or of another form


def _write_cache(path: Path, molecules: Molecules) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # An interrupted run must not leave half a file under the final name.
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial, positions=molecules.positions, energies=molecules.energies, settings=np.array(_settings())
    )
    os.replace(partial, path)


def _checked(molecules: Molecules) -> Molecules:
    size = TRAIN_SIZE + TEST_SIZE
    shapes = molecules.positions.shape, molecules.energies.shape
    if shapes != ((size, *REFERENCE_POSITIONS.shape), (size,)):
        raise ValueError(f"expected {size} molecules, found arrays of the shapes {shapes}")
    if not (np.isfinite(molecules.positions).all() and np.isfinite(molecules.energies).all()):
        raise ValueError("expected finite positions and energies")
    return molecules


def _generate(advance: Advance) -> Molecules:
    total = TRAIN_SIZE + TEST_SIZE
    # Each chunk has its own random numbers, so the data do not depend on the number of processes.
    chunks = list(range(total // _CHUNK))
    results: dict[int, Molecules] = {}
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(_generate_chunk, chunk): chunk for chunk in chunks}
        for future in as_completed(pending):
            results[pending[future]] = future.result()
            advance(len(results) * _CHUNK, total)
    positions = np.concatenate([results[chunk].positions for chunk in chunks])
    energies = np.concatenate([results[chunk].energies for chunk in chunks])
    return _checked(Molecules(positions, energies))


def _generate_chunk(chunk: int) -> Molecules:
    # Read when the library is loaded: one thread for each process, as the processes already fill the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    from tblite.interface import Calculator

    calculator = Calculator("GFN2-xTB", NUMBERS, REFERENCE_POSITIONS / _BOHR)
    calculator.set("verbosity", 0)

    def energy(positions: NDArray[np.float64]) -> float:
        calculator.update(positions / _BOHR)
        return float(calculator.singlepoint().get("energy")) * _HARTREE_IN_EV

    rng = np.random.default_rng([_SEED, chunk])
    displacements = rng.normal(0.0, DISPLACEMENT, (_CHUNK, *REFERENCE_POSITIONS.shape))
    # Rounded first, so that the energies belong to the very positions that the network gets.
    positions = (REFERENCE_POSITIONS + displacements).astype(np.float32)
    reference = energy(REFERENCE_POSITIONS)
    energies = [energy(molecule.astype(np.float64)) - reference for molecule in positions]
    return Molecules(positions, np.array(energies, np.float32))
