"""Networks that say the same in other words: the passes find the same in them, and in no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmkan_deploy.converters.passes import noted_outcomes
from lmkan_deploy.upstream import LMKAN2DLayer as BatchLastLayer
from rewritten import check, op_types

# --- Linear branches ---------------------------------------------------------------------------------

RELUS = {
    "relu": lambda x: torch.relu(x),
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0.0),
    "maximum": lambda x: torch.maximum(torch.zeros_like(x), x),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "where, the other way round": lambda x: torch.where(x <= 0, torch.zeros_like(x), x),
    "mask": lambda x: (x >= 0) * x,
    "threshold": lambda x: torch.nn.functional.threshold(x, 0.0, 0.0),
}
NO_RELUS = {
    "clamp": lambda x: x.clamp(min=0.5),
    "clamp to a range": lambda x: x.clamp(min=0, max=1),
    "maximum": lambda x: torch.maximum(x, torch.ones_like(x)),
    "where": lambda x: torch.where(x > 0.5, x, torch.zeros_like(x)),
    "where with another value": lambda x: torch.where(x > 0, x, torch.ones_like(x)),
    "the negative part": lambda x: torch.where(x < 0, x, torch.zeros_like(x)),
    "mask of another value": lambda x: (x.flip(-1) > 0) * x,
    "threshold": lambda x: torch.nn.functional.threshold(x, 0.5, 0.0),
}
PRODUCTS = {
    "linear": lambda self, x: self.linear(x),
    "matmul": lambda self, x: x @ self.linear.weight.T + self.linear.bias,
    "einsum": lambda self, x: torch.einsum("bi,oi->bo", x, self.linear.weight) + self.linear.bias,
    "einsum, the other way round": lambda self, x: (
        torch.einsum("...i,io->...o", x, self.linear.weight.T.contiguous()) + self.linear.bias
    ),
    "batch-last": lambda self, x: (self.linear.weight @ x.T + self.linear.bias[:, None]).T,
}


class Branched(torch.nn.Module):
    """A lookup layer of a batch-last class, and a linear branch behind some function."""

    def __init__(self, function, product) -> None:
        super().__init__()
        self.layer, self.linear = BatchLastLayer(8, 6, 4), torch.nn.Linear(6, 4)
        self.function, self.product = function, product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.3 * self.layer(x.T).T + self.product(self, self.function(x))


@pytest.mark.parametrize(
    ("relu", "product"),
    [
        *((relu, "linear") for relu in RELUS),
        *(("where", product) for product in PRODUCTS if product != "linear"),
    ],
)
def test_relu_first_branches_in_other_words(relu: str, product: str, tmp_path: Path) -> None:
    model = check(Branched(RELUS[relu], PRODUCTS[product]), "batch,6", tmp_path)
    assert op_types(model) == ["LMKAN2D"]


@pytest.mark.parametrize("other", NO_RELUS)
def test_what_is_no_relu_stays(other: str, tmp_path: Path) -> None:
    model = check(Branched(NO_RELUS[other], PRODUCTS["linear"]), "batch,6", tmp_path)
    assert "Gemm" in op_types(model)
    _, refused = noted_outcomes(model.metadata_props)
    assert "another function of them than ReLU" in refused["fold-linear-branch"][0]


def test_zeros_with_more_axes_are_no_relu(tmp_path: Path) -> None:
    model = check(
        Branched(lambda x: torch.maximum(x, torch.zeros(1, 1, 1)), PRODUCTS["linear"]), "batch,6", tmp_path
    )
    assert op_types(model) != ["LMKAN2D"]


SUMS = {
    "difference": lambda layer, branch, c: layer - branch,
    "difference, the other way round": lambda layer, branch, c: branch - layer,
    "multiple": lambda layer, branch, c: layer + 2 * branch,
    "multiple of each output": lambda layer, branch, c: layer + branch * c,
    "quotient": lambda layer, branch, c: 0.5 * layer - branch / 4,
    "quotients of each output": lambda layer, branch, c: branch / c + layer,
    "negative": lambda layer, branch, c: -branch + layer,
    "shift": lambda layer, branch, c: (branch + 3) * 0.5 + layer,
    "multiple of a difference": lambda layer, branch, c: -3 * (2 * branch - layer) + c,
}


class Summed(Branched):
    """The same of another sum."""

    def __init__(self, total) -> None:
        super().__init__(RELUS["relu"], PRODUCTS["linear"])
        self.total = total
        self.gain = torch.nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.total(self.layer(x.T).T, self.linear(torch.relu(x)), self.gain)


@pytest.mark.parametrize("total", SUMS)
def test_differences_and_multiples_of_branches(total: str, tmp_path: Path) -> None:
    assert op_types(check(Summed(SUMS[total]), "batch,6", tmp_path)) == ["LMKAN2D"]


def test_what_divides_by_a_branch_stays(tmp_path: Path) -> None:
    assert "Div" in op_types(check(Summed(lambda layer, branch, c: layer + c / branch), "batch,6", tmp_path))


# --- Layouts -----------------------------------------------------------------------------------------


class BatchLastNetwork(torch.nn.Module):
    """Batch-last from one end to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = BatchLastLayer(8, 6, 4), BatchLastLayer(8, 4, 2)
        self.linear = torch.nn.Linear(6, 4)
        self.gain = torch.nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.T
        branch = self.linear.weight @ torch.relu(x) + self.linear.bias[:, None]
        h = (self.gain[:, None] * self.first(x) + branch - 0.5) / 2
        return self.second(h).T


def test_batch_last_networks_become_batch_first(tmp_path: Path) -> None:
    model = check(BatchLastNetwork(), "batch,6", tmp_path)
    assert op_types(model) == ["LMKAN2D", "LMKAN2D"]


@pytest.mark.parametrize(
    "function",
    [
        lambda layer, x: torch.tanh(-layer(x.T)).T * 2,
        lambda layer, x: (layer(x.T) + torch.arange(4.0)[:, None]).T.sigmoid(),
        lambda layer, x: 3 - layer(x.T).T - torch.ones(1, 4),
        lambda layer, x: (layer(x.T) / torch.tensor([[1.0], [2.0], [3.0], [4.0]]) - torch.tanh(x[:, :4].T)).T,
    ],
)
def test_transposes_meet_behind_what_is_between_them(function, tmp_path: Path) -> None:
    model = check(_Wrapped(function), "batch,6", tmp_path)
    assert "Transpose" not in op_types(model)


class _Wrapped(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = BatchLastLayer(8, 6, 4), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer, x)


def test_a_transpose_that_others_use_stays(tmp_path: Path) -> None:
    model = check(
        _Wrapped(lambda layer, x: (lambda t: t.relu() + t.cumsum(0))(layer(x.T))), "batch,6", tmp_path
    )
    assert op_types(model).count("Transpose") == 1


@pytest.mark.parametrize("shape", ["batch,time,6", "batch,5,6", "2,time,3,6"])
@pytest.mark.parametrize("relu", [False, True])
def test_sequences_keep_their_axes(shape: str, relu: bool, tmp_path: Path) -> None:
    class Sequence(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.linear = BatchLastLayer(8, 6, 4), torch.nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x.reshape(-1, 6).T).T.reshape(*x.shape[:-1], 4)
            return 0.5 * y + self.linear(x.relu() if relu else x)

    model = check(Sequence(), shape, tmp_path)
    assert op_types(model) == ["LMKAN2D"]


@pytest.mark.parametrize(
    ("shape", "before", "after"),
    [
        ("batch,2,3,2", (-1, 6), (-1, 2, 4)),  # features of several axes
        ("batch,4,6", (-1, 6), (-1, 2, 4)),  # other leading axes behind the layer
        ("batch,2,6", (-1, 6), (-1, 8)),  # outputs of two rows together
    ],
)
def test_reshapes_that_move_features_stay(
    shape: str, before: tuple[int, ...], after: tuple[int, ...], tmp_path: Path
) -> None:
    network = _Wrapped(lambda layer, x: layer(x.reshape(before).T).T.reshape(after))
    assert op_types(check(network, shape, tmp_path)).count("Reshape") == 2
