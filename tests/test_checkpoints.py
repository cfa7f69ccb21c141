"""Loading of every kind of file, and refusal of everything else."""

from __future__ import annotations

import functools
import io
import json
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import lmkan_deploy
from lmkan_deploy import Architecture, upstream
from lmkan_deploy.checkpoints.input_shapes import example_inputs, input_specs, parse_input_shape
from lmkan_deploy.errors import CheckpointError
from lmkan_deploy.nn import LMKAN2DLayer
from networks import DATA, UserModel, make_stack


def outputs(checkpoint: lmkan_deploy.checkpoints.Checkpoint, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return checkpoint.module(torch.from_numpy(x)).numpy()


def assert_close(y: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(y - want).max() <= 1e-5 * np.abs(want).max()


# --- Files that load ---------------------------------------------------------------------------------


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


# --- Files that do not -------------------------------------------------------------------------------


def test_a_pickle_needs_trust(tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    for name, save in (("zip.pt", torch.save), ("raw.pt", lambda o, p: Path(p).write_bytes(pickle.dumps(o)))):
        save(Malicious(str(marker)), tmp_path / name)
        with pytest.raises(CheckpointError, match=r"pickled Python objects.*--trust-pickle"):
            lmkan_deploy.load_checkpoint(tmp_path / name)
    assert not marker.exists()


class Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found no file .*; check the path$"),
        (b"", "empty file .*; copy it again, or save it again$"),
        (b"hello, this is no checkpoint at all", "neither a zip archive nor a pickle; pass what torch.save"),
        (b"101 is a pickle's integer", "neither a zip archive nor a pickle; pass what torch.save"),
        (b"\x89PNG\r\n\x1a\n", "neither a zip archive nor a pickle; pass what torch.save"),
        (b"\x08\x0a\x12\x00", "an ONNX file: run lmkan-deploy optimize$"),
        (b"\x80\x02garbage", "--trust-pickle"),
        (b"PK\x03\x04" + bytes(100), "could not read .*: copy it again, or save it again$"),
    ],
)
def test_damaged_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        lmkan_deploy.load_checkpoint(path)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_truncated_files(fraction: float, user_model: UserModel, tmp_path: Path) -> None:
    content = user_model.state_dict.read_bytes()
    (tmp_path / "model.pt").write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(
        CheckpointError, match="truncated, damaged.*: copy it again, or save it again$"
    ) as error:
        lmkan_deploy.load_checkpoint(tmp_path / "model.pt", user_model.architecture)
    assert "miniz" not in str(error.value)


@pytest.mark.parametrize("offset", range(4, 46, 2))
def test_damaged_directories_of_archives(offset: int, tmp_path: Path) -> None:
    torch.save(make_stack(4, 2).state_dict(), tmp_path / "model.pt")
    content = bytearray((tmp_path / "model.pt").read_bytes())
    entry = content.index(b"PK\x01\x02")
    for value in (b"\xff\xff", b"\x7f\x7f", b"\x00\x08"):
        content[entry + offset : entry + offset + 2] = value
        content[entry + 46 : entry + 48] = b"\xff\xfe"  # of the name
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="copy it again, or save it again$") as error:
            lmkan_deploy.load_checkpoint(tmp_path / "model.pt")
        assert "\n" not in str(error.value)
    assert zipfile.is_zipfile(tmp_path / "model.pt")


def test_archives_that_span_disks(tmp_path: Path) -> None:
    torch.save(make_stack(4, 2).state_dict(), tmp_path / "model.pt")
    content = bytearray((tmp_path / "model.pt").read_bytes())
    locator = content.rindex(b"PK\x06\x07")
    content[locator + 16] = 2
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="copy it again, or save it again$"):
        lmkan_deploy.load_checkpoint(tmp_path / "model.pt")


def test_small_files_ask_for_little_memory(tmp_path: Path) -> None:
    """A table that shows one number 1.9 billion times is refused before a layer is built."""
    table = torch.zeros(1).as_strided((4, 4, 3000, 40000), (0, 0, 0, 0))
    torch.save({"0.func_parameter": table, "0.borders": torch.zeros(4)}, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 3000
    with pytest.raises(CheckpointError, match=r"found one of \[4, 4, 3000, 40000\] in 4 bytes; save"):
        lmkan_deploy.load_checkpoint(tmp_path / "model.pt")


def test_other_contents(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found the folder"):
        lmkan_deploy.load_checkpoint(tmp_path)
    for value, message in (
        ([1, 2], r"found a list; save model.state_dict\(\)$"),
        (3, "found an int; save model"),
        ((), "found a tuple; save model"),
        ({"epoch": 3, "loss": 0.5}, "keys 'epoch', 'loss'"),
        ({}, r"without keys; save model.state_dict\(\)$"),
        ({"model": {}}, "keys 'model'"),
        ({"0.func_parameter": torch.zeros(3), "epoch": 3}, "'epoch' of type int beside tensors"),
        ({0: torch.zeros(3)}, "the key 0 of type int"),
        (torch.zeros(3), r"found a Tensor; save model.state_dict\(\)$"),
    ):
        torch.save(value, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=message):
            lmkan_deploy.load_checkpoint(tmp_path / "model.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        lmkan_deploy.load_checkpoint(tmp_path / "script.pt")


def test_state_dicts_that_determine_no_network(tmp_path: Path) -> None:
    lookup, norm = LMKAN2DLayer(4, 4, 6).state_dict(), torch.nn.BatchNorm1d(6).state_dict()
    prefixed = lambda index, state: {f"{index}.{k}": v for k, v in state.items()}  # noqa: E731
    narrow = {"func_parameter": torch.zeros(3, 3, 2, 2), "borders": torch.zeros(3)}
    for state, message in (
        ({"layer1.func_parameter": torch.zeros(5, 5, 2, 2)}, "found the key 'layer1.func_parameter'"),
        (prefixed(0, lookup) | prefixed(2, norm), "no state of layer 1"),
        (prefixed(0, lookup) | prefixed(1, torch.nn.Linear(6, 2).state_dict()), "layer 1 with bias, weight"),
        (prefixed(0, lookup) | prefixed(1, torch.nn.BatchNorm1d(7).state_dict()), "6 features of layer 0"),
        (prefixed(0, narrow), r"found \[3, 3, 2, 2\]; train with a finer grid$"),
        ({"0.func_parameter": lookup["func_parameter"]}, "expected 0.borders beside .*; save all of"),
    ):
        torch.save(state, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=message):
            lmkan_deploy.load_checkpoint(tmp_path / "model.pt")


TABLE, NORM = torch.ones(5, 5, 6, 2), torch.ones(6)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("0.func_parameter", TABLE[:, :, :0], r"an output and a pair of inputs, found \[5, 5, 0, 2\]"),
        ("0.func_parameter", TABLE[..., :0], r"an output and a pair of inputs, found \[5, 5, 6, 0\]"),
        ("0.func_parameter", TABLE.long(), "floating point, found one of int64"),
        ("0.func_parameter", TABLE.to(torch.complex64), "floating point, found one of complex64"),
        ("0.func_parameter", TABLE.to(torch.float8_e4m3fn), "floating point, found one of float8_e4m3fn"),
        ("0.func_parameter", TABLE.to_sparse(), "found a sparse_coo one"),
        ("0.func_parameter", TABLE.to("meta"), "without data, of the meta device"),
        ("0.func_parameter", torch.zeros(1).expand(5, 5, 6, 1 << 40), r"found one of .* in 4 bytes; save"),
        ("0.func_parameter", TABLE.double() * 1e300, "found 300 NaN or infinite"),
        ("0.borders", torch.ones(6), r"expected 0.borders \[5\], found \[6\], which contradicts 0.func"),
        ("0.borders", torch.ones(5).to_sparse(), "expected 0.borders as a dense tensor"),
        ("1.running_mean", torch.ones(2, 3), r"expected 1.running_mean \[N\]"),
        ("1.running_mean", NORM * torch.nan, "finite values in 1.running_mean, found 6"),
        ("1.running_var", torch.ones(5), r"expected 1.running_var \[6\], found \[5\], which contradicts"),
        ("1.running_mean", torch.zeros(1).expand(1 << 40), r"found \[1099511627776\] in 4 bytes; save"),
        ("1.weight", torch.zeros(1).expand(6), r"found \[6\] in 4 bytes; save"),
        ("1.running_var", -NORM, "variances of at least 0 in 1.running_var, found -1"),
        ("1.weight", NORM * torch.inf, "finite values in 1.weight"),
        ("999999999.func_parameter", TABLE, "no state of layer 2"),
        ("9" * 30 + ".func_parameter", TABLE, "found the key '9999"),
    ],
)
def test_damaged_states(key: str, value: torch.Tensor, message: str, tmp_path: Path) -> None:
    module = torch.nn.Sequential(LMKAN2DLayer(4, 4, 6), torch.nn.BatchNorm1d(6))
    torch.save(module.state_dict() | {key: value}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        lmkan_deploy.load_checkpoint(tmp_path / "model.pt")
    assert "\n" not in str(error.value)


def test_damaged_states_of_a_factorys_network(user_model: UserModel, tmp_path: Path) -> None:
    state = torch.load(user_model.state_dict, weights_only=True)
    table = next(key for key in state if key.endswith("func_parameter"))
    for value, message in (
        (state[table].to("meta"), f"expected {table} as a dense tensor"),
        (state[table] * torch.nan, f"finite values in {table}"),
    ):
        torch.save(state | {table: value}, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=message):
            lmkan_deploy.load_checkpoint(tmp_path / "model.pt", user_model.architecture)


def test_state_dict_of_another_network_names_the_first_keys() -> None:
    with pytest.raises(CheckpointError) as error:
        lmkan_deploy.load_checkpoint(
            DATA / "methane.state_dict.pt", Architecture("user_models:PatchNet", DATA)
        )
    assert "missing in the checkpoint: conv1.gamma" in str(error.value)
    assert "unknown to the network: lmkan1.func_parameter" in str(error.value)
    assert "more" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tables_that_are_not_finite(value: float, tmp_path: Path) -> None:
    module = make_stack(4, 6, 2)
    with torch.no_grad():
        module[2].func_parameter[1, 2, 0, 1] = value
    torch.save(module.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="finite values in 2.func_parameter, found 1 NaN"):
        lmkan_deploy.load_checkpoint(tmp_path / "model.pt")


MASKED = """
import torch
from lmkan_deploy.nn import LMKAN2DLayer

class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mask = torch.nn.Parameter(torch.tensor([0.0, -torch.inf]))
        self.lookup = LMKAN2DLayer(4, 4, 2)
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x):
        return torch.softmax(self.linear(self.lookup(x)) + self.mask, -1)
"""


def test_parameters_that_may_be_infinite(tmp_path: Path) -> None:
    (tmp_path / "masked_network.py").write_text(MASKED)
    architecture = Architecture("masked_network:Masked", tmp_path)
    module = architecture.build()
    torch.save(module.state_dict(), tmp_path / "model.pt")
    module = lmkan_deploy.load_checkpoint(tmp_path / "model.pt", architecture).module
    torch.export.save(torch.export.export(module, (torch.randn(3, 4),)), tmp_path / "model.pt2")
    lmkan_deploy.load_checkpoint(tmp_path / "model.pt2")
    for key, value, message in (
        (
            "mask",
            torch.nan,
            "expected numbers in mask, found 1 NaN in .*; the training diverged: use an earlier",
        ),
        ("lookup.func_parameter", -torch.inf, "expected finite values in lookup.func_parameter"),
        ("linear.weight", -torch.inf, "expected finite values in linear.weight"),
    ):
        state = {name: tensor.contiguous().clone() for name, tensor in module.state_dict().items()}
        state[key].view(-1)[:1] = value
        torch.save(state, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=message):
            lmkan_deploy.load_checkpoint(tmp_path / "model.pt", architecture)


def test_a_grid_that_is_not_the_operators(tmp_path: Path) -> None:
    state = make_stack(4, 2).state_dict()
    state["0.borders"] = torch.linspace(-3, 3, 7)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="another grid"):
        lmkan_deploy.load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("user_models", "{}", "module:factory"),
        ("no_such_module:Net", "{}", "could not import 'no_such_module'"),
        ("user_models:NoNet", "{}", "class or function 'NoNet'"),
        ("user_models:MethaneNet", '{"width": 3}', "unexpected keyword argument 'width'"),
        ("user_models:MethaneNet", "{", "as JSON"),
        ("user_models:MethaneNet", "3", "object or array"),
        ("os.path:basename", '["a"]', "found str"),
    ],
)
def test_architectures_that_do_not_work(factory: str, arguments: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        lmkan_deploy.load_checkpoint(
            DATA / "methane.state_dict.pt", Architecture.parse(factory, DATA, arguments)
        )


def test_damaged_pickles_with_trust(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"\x80\x02garbage")
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        lmkan_deploy.load_checkpoint(tmp_path / "model.pt", trust_pickle=True)


def test_pickle_of_a_class_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "user_models", raising=False)
    with pytest.raises(CheckpointError, match="--arch-path"):
        lmkan_deploy.load_checkpoint(DATA / "methane.pickled.pt", trust_pickle=True)


# --- Exported programs run no code -------------------------------------------------------------------


@pytest.fixture
def program_file(tmp_path: Path) -> Path:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lmkan = LMKAN2DLayer(4, 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lmkan(torch.cat([x, x]))

    program = torch.export.export(
        Net().eval(), (torch.randn(8, 4),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def rewrite(path: Path, change) -> None:
    """Applies a function to every file of an archive."""
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, change(name, content))


def test_programs_with_symbolic_expressions_load(program_file: Path) -> None:
    assert lmkan_deploy.load_checkpoint(program_file).kind == "exported program"


def edit_program(path: Path, change) -> None:
    """Applies a function to the program's JSON document."""

    def rewritten(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        document = json.loads(content)
        change(document)
        return json.dumps(document).encode()

    rewrite(path, rewritten)


def set_expression(text: str):
    def change(document: dict) -> None:
        changed = 0
        for value in document["graph_module"]["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = text
                    changed += 1
        assert changed

    return change


def set_signature(key: str, value: object):
    def change(document: dict) -> None:
        document["graph_module"]["module_call_graph"][0]["signature"][key] = value

    return change


def set_target(target: str):
    def change(document: dict) -> None:
        document["graph_module"]["graph"]["nodes"][0]["target"] = target

    return change


def rename_values(code: str):
    def change(document: dict) -> None:
        values = document["graph_module"]["graph"]["tensor_values"]
        name = next(iter(values))
        values[f"{name}={code}"] = values.pop(name)

    return change


ENUM = [1, {"type": "builtins.list", "context": '{"__enum__": true, "fqn": "antigravity:X", "name": "a"}',
            "children_spec": [{"type": None, "context": None, "children_spec": []}]}]  # fmt: skip

ATTACKS = {
    "expression": lambda code: set_expression(code),
    "string in a call": lambda code: set_expression(f'floor("{code}")'),
    "string as a symbol": lambda code: set_expression(f'Symbol("{code}")'),
    "attribute": lambda code: set_expression("Symbol('s77').func"),
    "function of torch": lambda code: set_target("torch.os.system"),
    "operator that opens files": lambda code: set_target("torch.ops.aten.from_file.default"),
    "operator of another library": lambda code: set_target("torch.ops.inductor.accumulate_grad_.default"),
    "argument names": lambda code: set_signature("forward_arg_names", [f"x={code}"]),
    "annotated argument names": lambda code: set_signature("forward_arg_names", [f"x: {code}"]),
    "names of values": lambda code: rename_values(code),
    "enumeration": lambda code: set_signature("out_spec", json.dumps(ENUM)),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_programs_that_would_run_code_are_refused(attack: str, program_file: Path, tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    edit_program(program_file, ATTACKS[attack](f"__import__('pathlib').Path('{marker}').touch()"))
    with pytest.raises(CheckpointError, match="registered operators"):
        lmkan_deploy.load_checkpoint(program_file)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "model/data/aotinductor/model/x.wrapper.so",
        "model/data/constants/opaque_obj_0",
        "model/data/constants/custom_obj_0",
        "model/MODELS/model.json",
        "model/models/Model.json",
    ],
)
def test_archives_with_other_files_are_refused(name: str, program_file: Path) -> None:
    with zipfile.ZipFile(program_file, "a") as archive:
        archive.writestr(name, pickle.dumps(None))
    with pytest.raises(CheckpointError, match="holds"):
        lmkan_deploy.load_checkpoint(program_file)


def test_archives_with_pickled_tensors_are_refused(program_file: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        return (
            content.replace(b'"use_pickle": false', b'"use_pickle": true')
            if "weights_config" in name
            else content
        )

    rewrite(program_file, change)
    with pytest.raises(CheckpointError, match="holds pickled tensors"):
        lmkan_deploy.load_checkpoint(program_file)


def test_programs_with_pickled_inputs_are_refused(program_file: Path, tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    buffer = io.BytesIO()
    torch.save(Malicious(str(marker)), buffer)
    rewrite(program_file, lambda name, content: buffer.getvalue() if "sample_inputs" in name else content)
    with pytest.raises(CheckpointError):
        lmkan_deploy.load_checkpoint(program_file)
    assert not marker.exists()


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


def test_damaged_programs(program_file: Path) -> None:
    rewrite(program_file, lambda name, content: content[:50] if name.endswith("model.json") else content)
    with pytest.raises(CheckpointError, match="torch.export archive"):
        lmkan_deploy.load_checkpoint(program_file)


# --- Input shapes ------------------------------------------------------------------------------------


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
