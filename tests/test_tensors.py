"""Checks of tensors against a model: whether rows depend on each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lmkan_deploy.runtime.tensors import Arrays, TensorSpec, rows_are_independent

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
