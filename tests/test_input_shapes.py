"""Inputs of a network: shapes that are given, inferred or asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lmkan_deploy
from lmkan_deploy import Architecture
from lmkan_deploy.checkpoints.input_shapes import example_inputs, input_specs, parse_input_shape
from lmkan_deploy.errors import CheckpointError
from lmkan_deploy.nn import LMKAN2DLayer
from networks import DATA, make_stack


def test_input_shapes_are_parsed() -> None:
    spec = parse_input_shape("x:batch,4,8,8:float16")
    assert (spec.name, spec.shape, spec.dtype) == ("x", ("batch", 4, 8, 8), "float16")
    assert parse_input_shape("batch,12").name == ""
    assert parse_input_shape("n,3:int64").dtype == "int64"
    for text in ("", ",", "x:", "batch,-1", "batch,0", "a:b:c,1", "batch;12"):
        with pytest.raises(CheckpointError, match="expected an input shape such as"):
            parse_input_shape(text)


def test_input_shapes_are_inferred_or_asked_for() -> None:
    assert str(input_specs(make_stack(6, 3))[0]) == "x float32[batch, 6]"
    patchnet = Architecture("user_models:PatchNet", DATA).build()
    with pytest.raises(CheckpointError, match=r"does not take x float32\[batch, 16\].*--input-shape"):
        input_specs(patchnet)

    class Two(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return a + b

    with pytest.raises(CheckpointError, match="can't infer the shapes of the inputs a, b"):
        input_specs(Two())
    specs = input_specs(Two(), [parse_input_shape("b:n,2"), parse_input_shape("n,3")])
    assert [spec.name for spec in specs] == ["a", "b"]
    with pytest.raises(CheckpointError, match="found none for b"):
        input_specs(Two(), [parse_input_shape("n,3")])
    with pytest.raises(CheckpointError, match="found c"):
        input_specs(Two(), [parse_input_shape(t) for t in ("n,3", "n,3", "c:n,3")])
    assert json.dumps(specs[0].shape) == '["n", 3]'


def test_input_shapes_that_are_not_the_networks() -> None:
    class Rest(torch.nn.Module):
        def forward(self, x: torch.Tensor, *rest: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return x

    class Nothing(torch.nn.Module):
        def forward(self) -> None: ...

    stack = make_stack(6, 3)
    for module, shapes, message in (
        (stack, ("x:n,6", "x:n,6"), "found two for x"),
        (stack, ("z:n,6",), "expected inputs of x, found z"),
        (stack, ("n,6", "n,6"), "found 1 shapes too many"),
        (Nothing(), ("n,6",), "without parameters"),
        (Rest(), (), r"inputs x, \*rest"),
    ):
        with pytest.raises(CheckpointError, match=message):
            input_specs(module, [parse_input_shape(shape) for shape in shapes])
    specs = input_specs(Rest(), [parse_input_shape(shape) for shape in ("n,1", "n,2", "scale:n,3", "b:n,4")])
    assert [spec.name for spec in specs] == ["x", "rest0", "b", "scale"]
    with pytest.raises(CheckpointError, match="at most 1,073,741,824 elements"):
        example_inputs([parse_input_shape("n,999999999999999999999")], {"n": 2})


class Sequences(torch.nn.Module):
    """Lookup layers on [batch, length, features], around what a test chooses."""

    def __init__(self, middle) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = LMKAN2DLayer(6, 16, 16), LMKAN2DLayer(6, 16, 4)
        torch.nn.init.normal_(self.first.func_parameter)
        torch.nn.init.normal_(self.last.func_parameter)
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))
        self.middle = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.middle(self, self.first(x))


@pytest.mark.parametrize(
    ("middle", "inferred"),
    [
        (lambda net, x: net.last(net.attention(x, x, x)[0]), False),
        (lambda net, x: net.last(x).mean(-2), False),
        (lambda net, x: net.last(x - x.mean(-2, keepdim=True)), False),
        (lambda net, x: net.last(x), True),
        (lambda net, x: {"y": net.last(x), "class": net.last(x).argmax(-1), "scale": x.new_ones(2)}, True),
        (lambda net, x: (net.last(x).flatten(), None, x.new_ones(())), True),
        (lambda net, x: net.last(x) + torch.rand_like(net.last(x)), True),  # refused later, with the reason
        (lambda net, x: torch.nn.functional.batch_norm(x, net.mean, net.var, training=True), True),  # as well
        (lambda net, x: x - net.mean.mul_(0.5).add_(x.mean(0)), True),  # as well
    ],
    ids=["attention", "mean", "centred", "by row", "classes", "flat", "random", "training", "state"],
)
def test_rows_of_sequences_are_not_taken_for_batches(middle, inferred: bool) -> None:
    module = Sequences(middle).eval()
    for dtype in (torch.float32, torch.bfloat16):
        if inferred:
            name = str(dtype).removeprefix("torch.")
            assert [str(spec) for spec in input_specs(module.to(dtype))] == [f"x {name}[batch, 16]"]
            continue
        with pytest.raises(
            CheckpointError, match="depend on each other.*--input-shape x:batch,length,16, or"
        ):
            input_specs(module.to(dtype))
    assert len(input_specs(module, [parse_input_shape("batch,16")])) == 1


class Optional(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lookup = LMKAN2DLayer(4, 4, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 2.0) -> torch.Tensor:
        return self.lookup(x) * (scale if mask is None else mask)


@pytest.mark.parametrize(
    ("rest", "keywords", "found"),
    [((None,), {}, "mask with the constant None"), ((), {"scale": 3.0}, r"scale with the constant 3\.0")],
)
def test_programs_with_constants_among_their_inputs(rest, keywords, found: str, tmp_path: Path) -> None:
    program = torch.export.export(Optional().eval(), (torch.randn(3, 4), *rest), keywords)
    torch.export.save(program, tmp_path / "model.pt2")
    with pytest.raises(
        CheckpointError, match=f"expected tensors as inputs, found {found}; trace the network again"
    ):
        lmkan_deploy.export(tmp_path / "model.pt2", tmp_path / "model.onnx")
