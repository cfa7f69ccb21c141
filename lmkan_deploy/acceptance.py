"""Which differences between runtimes, and between a model and where it came from, are accepted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lmkan_deploy.errors import VerificationError
from lmkan_deploy.inspection import inspect_model
from lmkan_deploy.progress import Progress
from lmkan_deploy.runtime.runner import load_runner
from lmkan_deploy.runtime.tensors import Arrays
from lmkan_deploy.verification import ANY_FINITE_ERROR, Verification, verify_runners

INT8_RTOL = 3e-2
"""Allowed relative error between the compiled operator and the function of int8 tables: the kernels' weights
are multiples of 2^-14, beyond the grid of 2^-11: up to an eighth of a table's step, which networks amplify.
"""


def require_agreement(
    file: Path, cases: Mapping[str, Arrays], rtol: float | None, progress: Progress
) -> None:
    """The compiled operator and the function agree closely, however much their common tables cost."""
    reference = load_runner(file, "onnxruntime-function")
    own = own_tolerance(file)
    # Less than int8 kernels round by design would refuse files whose answers are within it.
    allowed = own if rtol is None else max(rtol, own or 0.0)
    result = verify_runners(reference, [load_runner(file)], cases, rtol=allowed, progress=progress)
    require_passed(result, "the compiled operator differs from the function in the file")


def own_tolerance(file: str | Path) -> float | None:
    """Allowed error between two runtimes of one file: compiled kernels round the weights of int8 tables."""
    has_int8 = any(layer.table_dtype == "int8" for layer in inspect_model(file).layers)
    return INT8_RTOL if has_int8 else None


def allowed_error(rtol: float | None, narrow: bool) -> float | None:
    """What narrow tables may cost: what the user says, or else anything finite, which is reported. A network
    amplifies their rounding by its slopes, most of all on random inputs.
    """
    return ANY_FINITE_ERROR if rtol is None and narrow else rtol


def require_passed(verification: Verification, what: str) -> None:
    """Raises VerificationError with the first failed comparison, if there is one."""
    if verification.passed:
        return
    worst = next((c for c in verification.comparisons if not c.passed), None)
    if worst is None:
        raise VerificationError(f"{what}: nothing was compared; nothing was written; pass --no-verify")
    raise VerificationError(
        f"{what}: {worst.runner}, {worst.case}, output {worst.output}: "
        f"{worst.problem or f'relative error {worst.max_rel:.2e}, allowed {worst.rtol:.0e}'}; nothing was "
        "written; pass --rtol to allow more, or --no-verify to look at the model"
    )
