"""What a user reads where a checkpoint can't be loaded: what was found, and what helps."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
import torch

import lmkan_deploy
from lmkan_deploy import Architecture
from lmkan_deploy.errors import CheckpointError
from lmkan_deploy.nn import LMKAN2DLayer
from networks import DATA, UserModel, make_stack


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
