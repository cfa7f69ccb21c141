"""Loading of every kind of file, and of the network in it that a key chooses."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lmkan_deploy
from lmkan_deploy import Architecture, upstream
from lmkan_deploy.checkpoints.input_shapes import input_specs
from lmkan_deploy.errors import CheckpointError
from lmkan_deploy.nn import LMKAN2DLayer
from networks import DATA, UserModel, make_stack


def outputs(checkpoint: lmkan_deploy.checkpoints.Checkpoint, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return checkpoint.module(torch.from_numpy(x)).numpy()


def assert_close(y: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(y - want).max() <= 1e-5 * np.abs(want).max()


def test_state_dict(user_model: UserModel) -> None:
    checkpoint = lmkan_deploy.load_checkpoint(user_model.state_dict, user_model.architecture)
    assert checkpoint.kind == "state dict"
    assert checkpoint.weights_only
    assert not checkpoint.module.training
    assert_close(outputs(checkpoint, user_model.x), user_model.y)


def test_pickled_module(user_model: UserModel) -> None:
    checkpoint = lmkan_deploy.load_checkpoint(user_model.pickled, Architecture(path=DATA), trust_pickle=True)
    assert checkpoint.kind == "pickled module"
    assert not checkpoint.weights_only
    assert_close(outputs(checkpoint, user_model.x), user_model.y)
    layers = [m for m in checkpoint.module.modules() if isinstance(m, upstream.LMKAN2DLayer)]
    assert len(layers) == user_model.num_lookups
    assert all(layer.table.is_contiguous() for layer in layers)


def test_exported_program(user_model: UserModel, tmp_path: Path) -> None:
    module = lmkan_deploy.load_checkpoint(user_model.state_dict, user_model.architecture).module
    dynamic = ({0: torch.export.Dim("batch")},)
    x = torch.from_numpy(user_model.x)
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=dynamic), tmp_path / "model.pt2")
    checkpoint = lmkan_deploy.load_checkpoint(tmp_path / "model.pt2")
    assert checkpoint.kind == "exported program"
    assert checkpoint.weights_only
    assert not lmkan_deploy.load_checkpoint(tmp_path / "model.pt2", trust_pickle=True).weights_only
    assert_close(outputs(checkpoint, user_model.x), user_model.y)


@pytest.mark.parametrize(
    "wrap", ["plain", "state_dict", "model_state_dict", "model", "net", "module.", "_orig_mod."]
)
def test_inferred_stack(wrap: str, tmp_path: Path) -> None:
    module = make_stack(6, 10, 4, 1)
    state = module.state_dict()
    if wrap.endswith("."):
        state = {wrap + key: value for key, value in state.items()}
    elif wrap != "plain":
        state = {wrap: state, "epoch": 3, "optimizer": {"state": {}}}
    torch.save(state, tmp_path / "model.pt")
    checkpoint = lmkan_deploy.load_checkpoint(tmp_path / "model.pt")
    assert checkpoint.kind == "inferred stack"
    assert "layers without weights" in checkpoint.notes[0]
    assert "eps" in checkpoint.notes[1]
    x = torch.randn(5, 6)
    torch.testing.assert_close(checkpoint.module(x), module(x), rtol=0, atol=0)


def test_inferred_stack_keeps_affine_batch_norm_and_half_tables(tmp_path: Path) -> None:
    module = torch.nn.Sequential(LMKAN2DLayer(4, 4, 6), torch.nn.BatchNorm1d(6), LMKAN2DLayer(4, 6, 2))
    module = module.half().eval()
    torch.nn.init.normal_(module[1].weight)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    loaded = lmkan_deploy.load_checkpoint(tmp_path / "model.pt").module
    assert loaded[0].func_parameter.dtype == torch.float16
    torch.testing.assert_close(loaded[1].weight.float(), module[1].weight.float())


def test_inferred_stack_of_float64_becomes_float32(tmp_path: Path) -> None:
    module = make_stack(6, 4, 2).double()
    torch.save(module.state_dict(), tmp_path / "model.pt")
    checkpoint = lmkan_deploy.load_checkpoint(tmp_path / "model.pt")
    assert "from float64 to float32" in checkpoint.notes[-1]
    x = torch.randn(5, 6)
    torch.testing.assert_close(checkpoint.module(x), module(x.double()).float())


@pytest.mark.parametrize("saved", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_a_network_whose_only_child_has_the_name_of_a_wrapper(saved: str, name: str, tmp_path: Path) -> None:
    outer = torch.nn.Module()
    outer.add_module(name, make_stack(6, 10, 4, 1))
    state = {saved + key: value for key, value in outer.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    (tmp_path / "wrapped_network.py").write_text(
        "import torch\n"
        "from networks import make_stack\n"
        "class Network(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        f"        self.{name} = make_stack(6, 10, 4, 1)\n"
        "    def forward(self, x):\n"
        f"        return self.{name}(x)\n"
    )
    architecture = lmkan_deploy.Architecture("wrapped_network:Network", tmp_path)
    checkpoint = lmkan_deploy.load_checkpoint(tmp_path / "model.pt", architecture)
    x = torch.randn(5, 6)
    torch.testing.assert_close(checkpoint.module(x), getattr(outer, name)(x), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["own state", "plain state", "pickled"])
@pytest.mark.parametrize(
    "wrapper",
    ["nn.DataParallel", "optim.swa_utils.AveragedModel", "compile", "nn.DataParallel(torch.compile"],
)
def test_wrapped_networks(wrapper: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closing = ")" * (1 + wrapper.count("("))
    (tmp_path / "wrapping.py").write_text(
        "import torch\n"
        "from networks import make_stack\n"
        f"def build():\n    return torch.{wrapper}(make_stack(6, 10, 4){closing}\n"
    )
    monkeypatch.delitem(sys.modules, "wrapping", raising=False)
    architecture = lmkan_deploy.Architecture("wrapping:build", tmp_path)
    module = architecture.build()
    plain = make_stack(6, 10, 4).state_dict()
    content = {"own state": module.state_dict(), "plain state": plain, "pickled": module}[form]
    torch.save(content, tmp_path / "model.pt")
    trust = form == "pickled"
    checkpoint = lmkan_deploy.load_checkpoint(tmp_path / "model.pt", architecture, trust_pickle=trust)
    assert [str(spec) for spec in input_specs(checkpoint.module)] == ["x float32[batch, 6]"]
    x = torch.randn(5, 6)
    torch.testing.assert_close(checkpoint.module(x), make_stack(6, 10, 4)(x), rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "model.", "net.inner."])
def test_state_of_a_larger_module(prefix: str, user_model: UserModel, tmp_path: Path) -> None:
    state = torch.load(user_model.state_dict, weights_only=True)
    first = next(iter(state)).split(".")[0]
    compiled = {k.replace(f"{first}.", f"{first}._orig_mod."): v for k, v in state.items()}
    outer = {prefix + k: v for k, v in compiled.items()}
    others = {"loss.weight": torch.ones(3)} if prefix else {}
    torch.save({"state_dict": outer | others, "optimizer_states": [{}]}, tmp_path / "model.pt")
    checkpoint = lmkan_deploy.load_checkpoint(tmp_path / "model.pt", user_model.architecture)
    assert_close(outputs(checkpoint, user_model.x), user_model.y)
    wanted = [f"left out 1 entries outside {prefix}, such as loss.weight"] if prefix else []
    assert checkpoint.notes == wanted


def test_ambiguous_checkpoints_are_refused(user_model: UserModel, tmp_path: Path) -> None:
    state = torch.load(user_model.state_dict, weights_only=True)
    both = {f"{name}.{key}": value for name in ("model", "ema") for key, value in state.items()}
    for content, message in (
        ({"model": state, "model_ema": state}, "several, under model, model_ema"),
        ({"nets": {"a": state, "b": state}}, r"several, under nets\.a, nets\.b"),
        (both, r"several, under model\., ema\."),
    ):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=message):
            lmkan_deploy.load_checkpoint(tmp_path / "model.pt", user_model.architecture)
    # A key chooses.
    averaged = {"n_averaged": torch.ones(1)} | {f"module.{name}": value for name, value in state.items()}
    other = {name: value + 1 for name, value in state.items()}
    for content, key in (
        ({"model": other, "model_ema": state}, "model_ema"),
        ({"nets": {"a": other, "b": state}}, "nets.b"),
        ({"model": other, "ema": {"state_dict": state, "decay": 0.9}}, "ema"),
        ({"nets": [other, state], "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, "nets.1"),
        ({"model": other, "swa": averaged}, "swa"),
        (
            {f"model.{name}": value for name, value in other.items()}
            | {f"ema.{n}": v for n, v in state.items()},
            "ema",
        ),
        ({"state": {f"ema.net.{n}": v for n, v in state.items()}, "epoch": 3}, "state.ema.net."),
        ({"state": {f"ema.module.{n}": v for n, v in state.items()} | {"n": torch.ones(1)}}, "state.ema"),
    ):
        torch.save(content, tmp_path / "model.pt")
        checkpoint = lmkan_deploy.load_checkpoint(tmp_path / "model.pt", user_model.architecture, key=key)
        assert_close(outputs(checkpoint, user_model.x), user_model.y)
        for wrong in ("nothing", "", "model_em", "nets.b.c"):
            if (key, wrong) == ("ema", ""):
                continue  # the whole file is one state dict
            with pytest.raises(
                CheckpointError, match="expected a network under --key .*, found networks under"
            ):
                lmkan_deploy.load_checkpoint(tmp_path / "model.pt", user_model.architecture, key=wrong)
    scaled = {"model": state, "scaler": {"mean": torch.zeros(3)}}  # tensors, but not of a network
    torch.save(scaled, tmp_path / "model.pt")
    lmkan_deploy.load_checkpoint(tmp_path / "model.pt", user_model.architecture)


def test_the_end_of_a_path_chooses(user_model: UserModel, tmp_path: Path) -> None:
    state = torch.load(user_model.state_dict, weights_only=True)
    other = {name: value + 1 for name, value in state.items()}
    lightning = {f"model.{n}": v for n, v in other.items()} | {f"ema_model.{n}": v for n, v in state.items()}
    wrapped = {f"module.{name}": value for name, value in lightning.items()}
    load = functools.partial(lmkan_deploy.load_checkpoint, architecture=user_model.architecture)
    for content, keys in (
        ({"state_dict": lightning, "epoch": 3}, ("ema_model", "ema_model.", "state_dict.ema_model")),
        ({"state_dict": wrapped}, ("ema_model", "state_dict.ema_model", "module.ema_model")),
        (
            {"run": {"state_dict": lightning}},
            ("ema_model", "state_dict.ema_model", "run.state_dict.ema_model"),
        ),
        ({"nets": {"a": other, "b": state}}, ("b",)),
    ):
        torch.save(content, tmp_path / "model.pt")
        for key in keys:
            assert_close(outputs(load(tmp_path / "model.pt", key=key), user_model.x), user_model.y)
        with pytest.raises(CheckpointError, match="expected a network under --key nothing .*; pass one of"):
            load(tmp_path / "model.pt", key="nothing")
    # Where two paths end alike, the message has keys that work.
    torch.save({"first": lightning, "second": lightning}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="several, under first.ema_model, second.ema_model; pass --key"):
        load(tmp_path / "model.pt", key="ema_model")
    assert_close(outputs(load(tmp_path / "model.pt", key="second.ema_model"), user_model.x), user_model.y)


def test_modules_in_a_dict(user_model: UserModel, tmp_path: Path) -> None:
    with Architecture(path=DATA).importable():
        module = torch.load(user_model.pickled, weights_only=False)
        content = {"model": module, "optimizer": {"state": {}}, "epoch": 3}
        torch.save(content, tmp_path / "model.pt")
        torch.save(content | {"ema": module}, tmp_path / "two.pt")
    load = functools.partial(lmkan_deploy.load_checkpoint, architecture=Architecture(path=DATA))
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        load(tmp_path / "model.pt")
    checkpoint = load(tmp_path / "model.pt", trust_pickle=True)
    assert checkpoint.kind == "pickled module"
    assert_close(outputs(checkpoint, user_model.x), user_model.y)
    with pytest.raises(CheckpointError, match="found several, under model, ema; pass --key"):
        load(tmp_path / "two.pt", trust_pickle=True)
    checkpoint = load(tmp_path / "two.pt", trust_pickle=True, key="ema")
    assert_close(outputs(checkpoint, user_model.x), user_model.y)


def test_arguments_of_the_factory() -> None:
    architecture = Architecture.parse("user_models:MethaneNet", DATA, '{"hidden": 64}')
    with pytest.raises(CheckpointError, match=r"expected \[13, 13, 64, 6\], found \[13, 13, 32, 6\]"):
        lmkan_deploy.load_checkpoint(DATA / "methane.state_dict.pt", architecture)
    positional = Architecture.parse("user_models:MethaneNet", DATA, "[32, 12]")
    assert lmkan_deploy.load_checkpoint(DATA / "methane.state_dict.pt", positional).kind == "state dict"
