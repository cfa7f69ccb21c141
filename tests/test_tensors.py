"""Checks of tensors against a model: whether rows depend on each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lmkan_deploy.errors import InputError
from lmkan_deploy.runtime.axis_limits import AnySize, AxisLimits, note_limits, noted_limits
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec, check_inputs, random_rows, rows_are_independent

INPUTS = [TensorSpec("x", ("batch", 16), "float32")]


def run(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Arrays]:
    return lambda feeds: {"y": function(feeds["x"])}


@pytest.mark.parametrize(
    ("function", "independent"),
    [
        (lambda x: np.tanh(x @ np.eye(16)), True),
        (lambda x: x * (1 + 3e-3 * len(x)), True),  # as rounding may be another for another batch
        (lambda x: x[:, :3].argmax(1), True),
        (lambda x: np.where(x > 0, np.nan, np.inf), True),
        (lambda x: x - x.mean(0), False),
        (lambda x: x / np.linalg.norm(x), False),
        (lambda x: np.sort(x, axis=0), False),
        (lambda x: x.repeat(len(x), axis=0), False),
    ],
    ids=["dense", "rounding", "classes", "not finite", "mean", "norm", "sorted", "more rows"],
)
def test_rows_that_depend_on_each_other_are_found(function, independent: bool) -> None:
    assert rows_are_independent(run(function), INPUTS) == independent


@pytest.mark.parametrize("seed", range(50))
def test_attention_over_rows_is_found_whatever_its_weights(seed: int) -> None:
    """Rows that look at themselves most hardly change for many a pair."""
    weights = np.random.default_rng(seed).standard_normal((16, 16)) / 4

    def attend(x: np.ndarray) -> np.ndarray:
        hidden = x @ weights
        scores = np.exp(hidden @ hidden.T / 2)
        return hidden + scores / scores.sum(-1, keepdims=True) @ hidden

    assert not rows_are_independent(run(attend), INPUTS)


def test_rows_of_models_with_other_free_axes() -> None:
    specs = [
        TensorSpec("x", ("n", 3, "h", "w"), "float32"),
        TensorSpec("a", ("n", "length"), "int64"),
        TensorSpec("b", ("m", 2), "float32"),
    ]
    limits = {"w": AxisLimits(5, None, 5), "m": AxisLimits(0, 100)}
    feeds = random_rows(specs, 1024, np.random.default_rng(0), limits)
    assert [feeds[name].shape for name in "xab"] == [(1024, 3, 8, 10), (1024, 8), (100, 2)]

    def mean(feeds: Arrays) -> Arrays:
        assert feeds["x"].shape[3] % 5 == 0
        return {"y": feeds["x"].mean((2, 3)) + feeds["b"][:, :1]}

    assert rows_are_independent(mean, specs[::2], limits)


@pytest.mark.parametrize("entry", ['{"B": [0, null, 0]}', '{"B": [0, null, -2]}', '{"B": 3}', "[]", "text"])
def test_limits_that_somebody_else_noted(entry: str) -> None:
    assert noted_limits({"lmkan_deploy.axis_limits": entry}) == {}


@pytest.mark.parametrize(
    ("limits", "sizes", "text"),
    [
        (AnySize, {0: 0, 1: 1, 7: 7}, "sizes from 1 on"),
        (AxisLimits(3, 6), {1: 3, 4: 4, 64: 6}, "sizes from 3 to 6"),
        (AxisLimits(3, None, 4), {1: 4, 4: 4, 5: 8}, "multiples of 4 from 4 on"),
        (AxisLimits(5, 15, 4), {1: 8, 64: 12}, "multiples of 4 from 5 to 15"),
    ],
    ids=str,
)
def test_sizes_within_limits(limits: AxisLimits, sizes: dict[int, int], text: str) -> None:
    assert {size: limits.nearest(size) for size in sizes} == sizes
    assert str(limits) == text
    metadata: dict[str, str] = {}
    note_limits(metadata, {"batch": limits})
    assert noted_limits(metadata) == {"batch": limits}


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a": 3}', '{"a": [1]}', '{"a": ["x", 2]}', '{"a": [1, 2, 3, 4]}']
)
def test_other_notes_are_no_limits(text: str) -> None:
    assert noted_limits({"lmkan_deploy.axis_limits": text}) == {}


def test_notes_of_earlier_releases() -> None:
    assert noted_limits({"lmkan_deploy.axis_limits": '{"a": [2, null]}'}) == {"a": AxisLimits(2, None, 1)}


def test_steps_are_checked() -> None:
    spec = TensorSpec("x", ("n", "h"), "float32")
    limits = {"h": AxisLimits(4, None, 4), "n": AxisLimits(2)}
    check_inputs([spec], {"x": np.zeros((1, 8), np.float32)}, limits)
    with pytest.raises(InputError, match=r"input x .* with h in multiples of 4, found shape \[1, 6\]"):
        check_inputs([spec], {"x": np.zeros((1, 6), np.float32)}, limits)
