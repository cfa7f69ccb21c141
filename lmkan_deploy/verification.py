"""Comparison of runtimes: does the exported model give the answers of the original?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkan_deploy.errors import InputError
from lmkan_deploy.progress import CountedSteps, Progress, no_progress
from lmkan_deploy.runtime.axis_limits import AnySize, AxisLimits
from lmkan_deploy.runtime.runner import Runner
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec, check_inputs, random_inputs

DEFAULT_RTOL = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Allowed relative error by the narrower type of the two outputs.

A layer's own float32 rounding is about 1e-6; networks amplify it by the slopes of their functions.
"""

RANDOM_RTOL = 1e-3
"""The least that is allowed on random inputs, which may lie far outside of what a network was trained on: its
tables are extrapolated there, and the rounding of each layer grows with their slopes.
"""

ANY_FINITE_ERROR = float(np.finfo(np.float64).max)
"""Allowed relative error where errors are to be reported and not judged."""

DISCRETE_RTOL = 0.01
"""Allowed share of integers or booleans that differ."""

RANDOM_CASE = "random"
"""First word of the names of random cases."""

BATCH_SIZES = (1, 2, 7, 64)
"""Sizes of the free axes of random inputs; see `random_cases`."""


@dataclass(frozen=True)
class Comparison:
    """One output of one runner against the reference, over one set of inputs.

    An element passes when |actual - expected| <= rtol * (|expected| + rms), where rms is the root mean
    square of the expected output: small elements of a large output need not be accurate to their own size.
    Of integers and booleans, which are labels, indices or masks, the share that differs is the relative
    error, and one element of a case may: a network's rounding decides near ties.

    The random cases share one rms, since a case of few rows may hold nothing but small values; other cases
    have their own.

    Attributes:
        runner: What ran.
        case: Which inputs.
        output: Name of the output.
        elements: Number compared.
        finite: Number of them that are finite in the reference.
        is_discrete: Whether they are integers or booleans.
        max_abs: Largest absolute error.
        max_rel: Largest error relative to |expected| + rms.
        p50_abs: Median absolute error.
        p99_abs: 99th percentile of the absolute error.
        p50_rel: Median relative error.
        p99_rel: 99th percentile of the relative error.
        rtol: Allowed relative error.
        first_bad: Index of the first element that fails, None when all pass.
        first_bad_values: Expected and actual value there.
        problem: Why nothing could be compared, None when it could.
    """

    runner: str
    case: str
    output: str
    elements: int = 0
    finite: int = 0
    is_discrete: bool = False
    max_abs: float = 0.0
    max_rel: float = 0.0
    p50_abs: float = 0.0
    p99_abs: float = 0.0
    p50_rel: float = 0.0
    p99_rel: float = 0.0
    rtol: float = 0.0
    first_bad: tuple[int, ...] | None = None
    first_bad_values: tuple[float, float] | None = None
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether all elements are within the tolerance."""
        return self.first_bad is None and self.problem is None


@dataclass(frozen=True)
class TableCost:
    """What the type of one layer's table costs.

    Attributes:
        layer: Name of the node.
        dtype: The table's type in the model.
        table_bytes: Its size in that type, the scales of an int8 table included; 0 where an earlier layer has the
            same one.
        errors: Type -> largest relative error of the model's outputs when this table alone has it, on the
            data; see `Comparison.max_rel`. A type whose range is too small is missing.
    """

    layer: str
    dtype: str
    table_bytes: int
    errors: dict[str, float]


@dataclass(frozen=True)
class TableCosts:
    """What a model's narrow tables cost.

    Attributes:
        layers: One for each lookup layer, in the graph's order.
        together: Largest relative error of the model's outputs with all of them, on the same data.
        data: What that data is, such as "random inputs".
    """

    layers: list[TableCost]
    together: float
    data: str


@dataclass(frozen=True)
class Verification:
    """All comparisons of one call.

    Attributes:
        reference: What the runners were compared with.
        comparisons: One for each runner, case and output.
        tables: What narrow tables cost, where the reference is a model with wider ones; otherwise None.
    """

    reference: str
    comparisons: list[Comparison]
    tables: TableCosts | None = None

    @property
    def passed(self) -> bool:
        """Whether every comparison passed, and there was at least one."""
        return bool(self.comparisons) and all(comparison.passed for comparison in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        """The same as plain types."""
        comparisons = [asdict(c) | {"passed": c.passed} for c in self.comparisons]
        tables = None if self.tables is None else asdict(self.tables)
        return {
            "reference": self.reference,
            "passed": self.passed,
            "comparisons": comparisons,
            "tables": tables,
        }


def random_cases(
    specs: Sequence[TensorSpec],
    *,
    sizes: Sequence[int] = BATCH_SIZES,
    limits: Mapping[str, AxisLimits] | None = None,
    seed: int = 0,
) -> dict[str, Arrays]:
    """Random inputs of several sizes; one case where no axis is free.

    Args:
        specs: Inputs of a model.
        sizes: Sizes of the free axes, a case for each. Where axes have several names, the first takes the
            sizes in their order and the others are one, two, ... sizes ahead, so that a mix-up shows.
        limits: Of free axes that may not have every size, by name: the nearest allowed size is taken.
        seed: Of the random numbers.

    Returns:
        Inputs by the name of their case.
    """
    limits = {} if limits is None else limits
    rng = np.random.default_rng(seed)
    free = list(dict.fromkeys(size for spec in specs for size in spec.shape if not isinstance(size, int)))
    if not free:
        return {RANDOM_CASE: random_inputs(specs, {None: 0}, rng)}
    cases = {}
    for index in range(len(sizes)):
        chosen = {
            name: limits.get(name or "", AnySize).nearest(sizes[(index + ahead) % len(sizes)])
            for ahead, name in enumerate(free)
        }
        case = f"{RANDOM_CASE} {' x '.join(map(str, chosen.values()))}"
        cases[case] = random_inputs(specs, {None: sizes[index], **chosen}, rng)
    return cases


def check_tolerance(rtol: float | None) -> None:
    """Refuses a tolerance that would accept everything or nothing.

    Raises:
        InputError: It is negative, infinite or NaN.
    """
    if rtol is not None and not 0 <= rtol < np.inf:
        raise InputError(f"expected a relative tolerance of at least 0 and finite, found {rtol}")


def verify_runners(
    reference: Runner | Mapping[str, Arrays],
    runners: Sequence[Runner],
    cases: Mapping[str, Arrays],
    *,
    rtol: float | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Runs every runner on every case and compares it with the reference.

    Args:
        reference: A runner, or its stored outputs by case.
        runners: What to verify.
        cases: Inputs by the name of their case. Random ones that the reference refuses are left out where there
            are others.
        rtol: Allowed relative error; None takes `DEFAULT_RTOL` of the outputs' type, on random inputs at least
            `RANDOM_RTOL`.
        progress: Called before each run.

    Returns:
        The comparisons; a runner that fails on a case yields one with a `problem`.

    Raises:
        InputError: The reference itself does not take a case, or the tolerance is no number.
    """
    check_tolerance(rtol)
    comparisons: list[Comparison] = []
    steps = CountedSteps(progress, len(cases) * (len(runners) + (not isinstance(reference, Mapping))))
    expected = _expected(reference, cases, steps)
    scales = _root_mean_squares(expected)
    for case, feeds in ((case, feeds) for case, feeds in cases.items() if case in expected):
        for runner in runners:
            steps.begin(f"running {runner.name} on {case}")
            try:
                check_inputs(runner.inputs, feeds)
                actual = runner.run(feeds)
            except InputError as error:
                comparisons.append(Comparison(runner.name, case, "", problem=str(error)))
                continue
            for output, want in expected[case].items():
                base = Comparison(runner.name, case, output)
                comparisons.append(_compare(base, want, actual, scales[_pool(case), output], rtol))
    name = "stored outputs" if isinstance(reference, Mapping) else reference.name
    return Verification(name, _require_finite(comparisons))


def _require_finite(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Gives outputs of which no case has a finite element a problem: nothing of them was compared."""
    seen = {(c.runner, c.output) for c in comparisons if c.finite > 0 or c.elements == 0}
    problem = "expected finite outputs to compare, found none; pass --inputs with real ones"
    return [
        c if c.problem is not None or (c.runner, c.output) in seen else replace(c, problem=problem)
        for c in comparisons
    ]


def _expected(
    reference: Runner | Mapping[str, Arrays], cases: Mapping[str, Arrays], steps: CountedSteps
) -> Mapping[str, Arrays]:
    if isinstance(reference, Mapping):
        return reference
    result = {}
    # Networks may have reasons of their own to refuse random inputs; real ones then are enough.
    needed = {_pool(case) for case in cases} == {RANDOM_CASE}
    for case, feeds in cases.items():
        steps.begin(f"running {reference.name} on {case}")
        try:
            result[case] = reference.run(feeds)
        except InputError as error:
            if _pool(case) != RANDOM_CASE:
                raise
            if needed:
                raise InputError(
                    f"{case}: {error}; pass real --inputs, or give axes sizes that it takes, or --no-verify"
                ) from error
    return result


def _pool(case: str) -> str:
    """Cases of one pool share a scale. Given inputs never share theirs with random ones, whose outputs may
    be of another size altogether.
    """
    return RANDOM_CASE if case.startswith(RANDOM_CASE) else case


def _root_mean_squares(expected: Mapping[str, Arrays]) -> dict[tuple[str, str], float]:
    """(pool, output) -> root mean square of the finite elements."""
    total: dict[tuple[str, str], tuple[float, int]] = {}
    for case, outputs in expected.items():
        for name, array in outputs.items():
            values = array.astype(np.float64)
            values = values[np.isfinite(values)]
            squares, count = total.get((_pool(case), name), (0.0, 0))
            total[_pool(case), name] = (squares + float(np.square(values).sum()), count + values.size)
    return {key: np.sqrt(squares / count) if count else 0.0 for key, (squares, count) in total.items()}


def _compare(
    base: Comparison, want: NDArray[Any], actual: Arrays, rms: float, rtol: float | None
) -> Comparison:
    if base.output not in actual:
        return replace(base, problem=f"expected an output {base.output}, found {', '.join(actual)}")
    got = actual[base.output]
    if want.shape != got.shape:
        return replace(base, problem=f"expected shape {list(want.shape)}, found {list(got.shape)}")
    if _is_discrete(want) and _is_discrete(got):
        return _count_differences(replace(base, rtol=DISCRETE_RTOL if rtol is None else rtol), want, got)
    if rtol is None:
        rtol = max(DEFAULT_RTOL.get(array.dtype.name, 0.0) for array in (want, got))
        if rtol > 0.0 and _pool(base.case) == RANDOM_CASE:
            rtol = max(rtol, RANDOM_RTOL)
    return _statistics(replace(base, rtol=rtol), want, got, rms)


def _is_discrete(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "iub"


def _count_differences(base: Comparison, want: NDArray[Any], got: NDArray[Any]) -> Comparison:
    base = replace(base, elements=want.size, finite=want.size, is_discrete=True)
    differs = np.argwhere(want != got)
    if len(differs) == 0:
        return base
    share = len(differs) / want.size
    largest = float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max())
    first = tuple(int(i) for i in differs[0]) if len(differs) > 1 and share > base.rtol else None
    values = None if first is None else (float(want[first]), float(got[first]))
    return replace(
        base, max_abs=largest, max_rel=share, p99_rel=share, first_bad=first, first_bad_values=values
    )


def _statistics(base: Comparison, want: NDArray[Any], got: NDArray[Any], rms: float) -> Comparison:
    if want.size == 0:
        return base
    with np.errstate(invalid="ignore", over="ignore"):
        want, got = want.astype(np.float64), got.astype(np.float64)
        finite = np.isfinite(want)
        error = np.abs(got - want)
        # Values that are not finite pass when both sides have one.
        error = np.where(~finite & ~np.isfinite(got), 0.0, error)
        error = np.where(np.isfinite(error), error, np.inf)
        scale = np.where(finite, np.abs(want), 0.0) + rms
        relative = np.divide(error, scale, out=np.where(error > 0, np.inf, 0.0), where=scale > 0)
        p50_abs, p99_abs = np.quantile(error, (0.5, 0.99))
        p50_rel, p99_rel = np.quantile(relative, (0.5, 0.99))
    bad = np.argwhere(relative > base.rtol)
    first = tuple(int(i) for i in bad[0]) if len(bad) else None
    return replace(
        base,
        elements=want.size,
        finite=int(finite.sum()),
        max_abs=float(error.max()),
        max_rel=float(relative.max()),
        p50_abs=float(p50_abs),
        p99_abs=float(p99_abs),
        p50_rel=float(p50_rel),
        p99_rel=float(p99_rel),
        first_bad=first,
        first_bad_values=None if first is None else (float(want[first]), float(got[first])),
    )
