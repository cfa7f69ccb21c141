"""The comparator: it must find what is wrong, where, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from lmkan_deploy.acceptance import require_passed
from lmkan_deploy.errors import InputError, VerificationError
from lmkan_deploy.progress import Step
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec
from lmkan_deploy.verification import random_cases, verify_runners


class Fixed:
    """Returns stored outputs."""

    name = "fixed"

    def __init__(self, outputs: Arrays) -> None:
        self.inputs = [TensorSpec("x", ("n", 2), "float32")]
        self.outputs: list[TensorSpec] = []
        self._outputs = outputs

    def run(self, feeds: Arrays) -> Arrays:
        return self._outputs


def compare(want: np.ndarray, got: np.ndarray, **options):
    feeds = {"case": {"x": np.zeros((1, 2), np.float32)}}
    return verify_runners({"case": {"y": want}}, [Fixed({"y": got})], feeds, **options)


def test_equal_outputs_pass() -> None:
    y = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    result = compare(y, y.copy())
    assert result.passed
    assert result.comparisons[0].max_abs == 0
    assert result.comparisons[0].elements == 12


def test_progress_counts_all_runs() -> None:
    same = Fixed({"y": np.ones(3, np.float32)})
    feeds = {"x": np.zeros((1, 2), np.float32)}
    steps: list[Step] = []
    verify_runners(same, [same, same], {"a": feeds, "b": feeds}, progress=steps.append)
    assert [(step.done, step.total) for step in steps] == [(done, 6) for done in range(6)]
    assert str(steps[0]) == "running fixed on a"


def test_the_first_bad_element_is_named() -> None:
    y = np.ones((3, 4), np.float32)
    bad = y.copy()
    bad[1, 2], bad[2, 0] = 1.5, 2.0
    comparison = compare(y, bad).comparisons[0]
    assert not comparison.passed
    assert comparison.first_bad == (1, 2)
    assert comparison.first_bad_values == (1.0, 1.5)
    assert comparison.max_abs == 1.0
    assert comparison.max_rel == pytest.approx(0.5)
    assert comparison.p50_abs == 0


def test_the_tolerance_follows_the_type() -> None:
    y = np.ones(4)
    for dtype, small, large in ((np.float32, 1e-4, 1e-3), (np.float16, 1e-2, 1e-1)):
        assert compare(y.astype(dtype), (y + small).astype(dtype)).passed
        assert not compare(y.astype(dtype), (y + large).astype(dtype)).passed
    assert not compare(y, y + 1e-6, rtol=1e-7).passed


def test_small_elements_are_judged_by_the_size_of_the_output() -> None:
    y = np.array([1e-9, 1.0], np.float32)
    assert compare(y, y + np.array([1e-6, 0], np.float32)).passed
    assert not compare(y * 0, y * 0 + 1e-30).passed  # an output that is all zeros has no size


def test_given_inputs_have_a_scale_of_their_own() -> None:
    """Random inputs may drive a network far out of its range; that must not excuse errors inside it."""
    far, near = {"y": np.full(4, 1e6)}, {"y": np.ones(4)}
    x = {"x": np.zeros((1, 2), np.float32)}
    expected = {"random 1": far, "random 2": far, "given inputs": near}
    result = verify_runners(expected, [Fixed({"y": np.ones(4) * 1.5})], dict.fromkeys(expected, x))
    assert [c.passed for c in result.comparisons] == [False, False, False]
    pooled = verify_runners(
        {"random 1": far, "random 2": near}, [Fixed(near)], {"random 2": x, "random 1": x}
    ).comparisons
    assert [c.passed for c in pooled] == [True, False]


def test_values_that_are_not_finite() -> None:
    y = np.array([np.nan, np.inf, 1.0])
    assert compare(y, np.array([np.inf, np.nan, 1.0])).passed
    for bad in (np.array([0.0, np.inf, 1.0]), np.array([np.nan, np.inf, np.nan])):
        assert not compare(y, bad).passed


def test_outputs_without_a_finite_element_are_failures() -> None:
    bad = np.full((2, 2), np.nan, np.float32)
    (comparison,) = compare(bad, bad.copy()).comparisons
    assert not comparison.passed
    assert "expected finite outputs to compare, found none; pass --inputs" in str(comparison.problem)
    # Another case with finite elements is enough.
    good = np.ones((2, 2), np.float32)
    feeds = {"x": np.zeros((1, 2), np.float32)}

    class ByCase(Fixed):
        def run(self, feeds: Arrays) -> Arrays:
            return {"y": bad if feeds["x"][0, 0] == 0 else good}

    cases = {"a": feeds, "b": {"x": np.ones((1, 2), np.float32)}}
    assert verify_runners({"a": {"y": bad}, "b": {"y": good}}, [ByCase({})], cases).passed


def test_random_inputs_that_the_network_refuses() -> None:
    good = np.ones((2, 2), np.float32)

    class Choosy(Fixed):
        def run(self, feeds: Arrays) -> Arrays:
            if feeds["x"][0, 0] == 0:
                raise InputError("expected ones")
            return {"y": good}

    zeros, ones = ({"x": np.full((1, 2), value, np.float32)} for value in (0, 1))
    found = verify_runners(Choosy({}), [Fixed({"y": good})], {"random 1": zeros, "given inputs": ones})
    assert found.passed
    assert [comparison.case for comparison in found.comparisons] == ["given inputs"]
    with pytest.raises(InputError, match="random 1: expected ones; pass real --inputs, or"):
        verify_runners(Choosy({}), [Fixed({"y": good})], {"random 1": zeros})
    with pytest.raises(InputError, match="^expected ones"):
        verify_runners(Choosy({}), [Fixed({"y": good})], {"random 1": ones, "given inputs": zeros})


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
def test_labels_are_judged_by_how_many_differ(dtype: type) -> None:
    want = np.zeros(300, dtype)
    got = want.copy()
    assert compare(want, got).comparisons[0].max_rel == 0
    got[7] = 1
    assert compare(want, got).passed  # a near tie
    assert compare(want, got).comparisons[0].max_rel == pytest.approx(1 / 300)
    got[8:11] = 1
    failed = compare(want, got).comparisons[0]
    assert not failed.passed
    assert failed.first_bad == (7,)
    assert failed.max_rel == pytest.approx(4 / 300)
    assert compare(want, got, rtol=0.02).passed
    assert compare(want[:1], got[7:8]).passed


def test_problems_are_failures() -> None:
    y = np.ones((2, 3))
    assert "found [3, 2]" in str(compare(y, y.T).comparisons[0].problem)
    feeds = {"case": {"x": np.zeros((1, 2), np.float32)}}
    missing = verify_runners({"case": {"z": y}}, [Fixed({"y": y})], feeds)
    assert "expected an output z, found y" in str(missing.comparisons[0].problem)
    wrong = verify_runners({"case": {"y": y}}, [Fixed({"y": y})], {"case": {"x": np.zeros((1, 3))}})
    assert not wrong.passed
    assert not verify_runners({}, [Fixed({"y": y})], {}).passed  # nothing compared is no success


def test_empty_outputs_pass() -> None:
    assert compare(np.zeros((0, 3)), np.zeros((0, 3))).passed


def test_random_cases_cover_the_batch_sizes() -> None:
    specs = [TensorSpec("x", ("n", 3), "float32"), TensorSpec("ids", ("n",), "int64")]
    cases = random_cases(specs, sizes=[0, 5])
    assert {name: case["x"].shape for name, case in cases.items()} == {"random 0": (0, 3), "random 5": (5, 3)}
    assert cases["random 5"]["ids"].dtype == np.int64
    assert list(random_cases([TensorSpec("x", (2, 3), "float32")])) == ["random"]


def test_axes_of_several_names_take_several_sizes() -> None:
    specs = [TensorSpec("x", ("n", "t", 3), "float32"), TensorSpec("mask", ("n", None), "float32")]
    cases = random_cases(specs, sizes=[1, 2, 7])
    assert [(case["x"].shape, case["mask"].shape) for case in cases.values()] == [
        ((1, 2, 3), (1, 7)),
        ((2, 7, 3), (2, 1)),
        ((7, 1, 3), (7, 2)),
    ]
    assert list(cases) == ["random 1 x 2 x 7", "random 2 x 7 x 1", "random 7 x 1 x 2"]
    assert list(random_cases(specs, sizes=[5])) == ["random 5 x 5 x 5"]


@pytest.mark.parametrize("rtol", [float("nan"), float("inf"), -1e-3])
def test_tolerances_that_say_nothing_are_refused(rtol: float) -> None:
    with pytest.raises(InputError, match="expected a relative tolerance"):
        compare(np.ones(3), np.zeros(3), rtol=rtol)


def test_nothing_compared_is_an_error_that_says_so() -> None:
    with pytest.raises(VerificationError, match="nothing was compared"):
        require_passed(verify_runners({}, [Fixed({})], {}), "the model differs")
