"""The user's code: from the folder that was named, in its present version, whatever else the process imported."""

from __future__ import annotations

import importlib
import io
import signal
import sys
from pathlib import Path

import pytest
import torch

import lmkan_deploy
from lmkan_deploy import Architecture, cli, upstream
from lmkan_deploy.checkpoints import user_modules
from lmkan_deploy.errors import CheckpointError
from lmkan_deploy.nn import LMKAN2DLayer

NET = """
import torch
from {helper} import factor
from lmKAN import LMKAN2DLayer

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = LMKAN2DLayer(4, 4, 2)

    def forward(self, x):
        from {helper} import offset
        return factor() * self.layer(x.T).T + offset
"""


def write_helper(folder: Path, factor: float, name: str = "zz_helper") -> None:
    (folder / f"{name}.py").write_text(f"offset = {factor}\ndef factor():\n    return {factor}\n")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two folders with modules of the same names that compute other things."""
    torch.manual_seed(0)
    for index, factor in enumerate((1.0, 2.0)):
        folder = tmp_path / f"e{index + 1}"
        folder.mkdir()
        (folder / "zz_models.py").write_text(NET.format(helper="zz_helper"))
        write_helper(folder, factor)
        package = folder / "zz_package"
        package.mkdir()
        (package / "nets.py").write_text(NET.format(helper="zz_package.zz_helper"))
        write_helper(package, factor)
    torch.save({f"layer.{k}": v for k, v in LMKAN2DLayer(4, 4, 2).state_dict().items()}, tmp_path / "m.pt")
    before = {name for name in sys.modules if name.startswith("zz_")}
    yield tmp_path / "e1", tmp_path / "e2"
    for name in [name for name in sys.modules if name.startswith("zz_") and name not in before]:
        del sys.modules[name]


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def load(folder: Path, factory: str = "zz_models:Net") -> torch.nn.Module:
    return lmkan_deploy.load_checkpoint(folder.parent / "m.pt", Architecture(factory, folder)).module


def factor(module: torch.nn.Module) -> tuple[float, float]:
    """Of the function that was imported with the module, and of the value that is imported at each call."""
    y, plain = module(X), module.layer(X.T).T
    found = torch.linalg.lstsq(torch.stack([plain.flatten(), torch.ones(plain.numel())], 1), y.flatten())
    return tuple(round(value, 3) for value in found.solution.flatten().tolist())


@pytest.mark.parametrize("factory", ["zz_models:Net", "zz_package.nets:Net"])
def test_two_folders_with_the_same_names(factory: str, folders: tuple[Path, Path]) -> None:
    first = load(folders[0], factory)
    assert factor(first) == (1.0, 1.0)
    second = load(folders[1], factory)
    assert factor(second) == (2.0, 2.0)
    assert factor(first)[0] == 1.0
    assert type(first) is not type(second)
    assert factor(load(folders[0], factory)) == (1.0, 1.0)
    program = torch.export.export(second, (X,))
    assert factor(second)[0] == 2.0
    torch.testing.assert_close(program.module()(X), 2 * second.layer(X.T).T + 1.0)  # of the folder in use


def test_two_folders_are_exported(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for folder, expected in zip(folders, (1.0, 2.0), strict=True):
        architecture = Architecture("zz_models:Net", folder)
        lmkan_deploy.export(tmp_path / "m.pt", tmp_path / "m.onnx", architecture=architecture)
        y = lmkan_deploy.load_runner(tmp_path / "m.onnx").run({"x": X.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(next(iter(y.values()))), load(folder)(X), rtol=1e-4, atol=1e-5
        )
        assert factor(load(folder)) == (expected, expected)


def test_pickles_of_two_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for index, folder in enumerate(folders):
        torch.save(
            load(folder), tmp_path / f"{index}.pt"
        )  # the last one's classes are those that pickle finds
    for index, folder in enumerate(folders):
        checkpoint = lmkan_deploy.load_checkpoint(
            tmp_path / f"{index}.pt", Architecture(path=folder), trust_pickle=True
        )
        assert factor(checkpoint.module) == (index + 1.0, index + 1.0)
        torch.save(checkpoint.module, io.BytesIO())


def test_edited_files_are_read_again(folders: tuple[Path, Path]) -> None:
    folder = folders[0]
    first, same = load(folder), load(folder)
    assert type(first) is type(same)  # as long as nothing changed, classes are the same
    write_helper(folder, 3.0)  # as long as before, and within the same second
    assert factor(load(folder)) == (3.0, 3.0)
    assert not list(folder.rglob("*.pyc"))


def test_files_that_a_folder_does_not_have(folders: tuple[Path, Path]) -> None:
    load(folders[0])
    (folders[1] / "zz_helper.py").unlink()
    with pytest.raises(CheckpointError, match="No module named 'zz_helper'; install 'zz_helper', or pass"):
        load(folders[1])
    with pytest.raises(CheckpointError, match="--arch-path"):
        Architecture("zz_models:Net").build()  # of no folder
    assert factor(load(folders[0])) == (1.0, 1.0)


def test_the_process_keeps_its_own_modules(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folders[0])
    own = importlib.import_module("zz_helper"), importlib.import_module("zz_package.zz_helper")
    for factory in ("zz_models:Net", "zz_package.nets:Net"):
        assert factor(load(folders[1], factory))[0] == 2.0
    assert own == (sys.modules["zz_helper"], sys.modules["zz_package.zz_helper"])
    assert "zz_package.nets" not in sys.modules
    with upstream.stand_in():
        assert importlib.import_module("zz_package.nets").factor() == 1.0


def test_modules_of_the_process_that_are_the_folders(folders: tuple[Path, Path], monkeypatch) -> None:
    monkeypatch.syspath_prepend(folders[0])
    with monkeypatch.context() as context:
        context.setattr(user_modules, "_process_start", lambda: 0.0)  # the file may be newer than the import
        own = importlib.import_module("zz_helper")
        load(folders[0])
        assert sys.modules["zz_helper"] is own
    with monkeypatch.context() as context:
        context.setattr(user_modules, "_process_start", lambda: 1e12)
        sys.modules.pop("zz_models", None)
        load(folders[0])
        assert sys.modules["zz_models"].factor is own.factor
    assert 0 < user_modules._process_start() < Path(__file__).stat().st_atime + 1e9


def test_installed_packages_are_never_set_aside(folders: tuple[Path, Path]) -> None:
    numpy, json = sys.modules["numpy"], sys.modules["json"]
    for name in ("numpy", "json", "lmkan_deploy", "torch"):
        (folders[0] / f"{name}.py").write_text("raise ValueError\n")
    (folders[0] / "pytest").mkdir()  # comes after the installed package
    pytest_before = sys.modules["pytest"]
    assert factor(load(folders[0])) == (1.0, 1.0)
    assert (sys.modules["numpy"], sys.modules["json"], sys.modules["pytest"]) == (numpy, json, pytest_before)
    with pytest.raises(CheckpointError, match="has the same name and is in use; rename yours"):
        load(folders[0], "numpy:array")


# --- Code that ends the process ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)\n",
        "import argparse\nargparse.ArgumentParser().parse_args(['--unknown'])\n",
        "import sys\ndef Net():\n    sys.exit('done')\n",
    ],
    ids=["exit", "argparse", "factory"],
)
def test_code_that_ends_the_process(code: str, folders: tuple[Path, Path]) -> None:
    (folders[0] / "zz_models.py").write_text(code)
    with pytest.raises(CheckpointError, match="ends the process with .*; guard the script with if __name__"):
        load(folders[0])


class Ends:
    def __reduce__(self) -> tuple:
        return (sys.exit, (0,))


def test_pickles_that_end_the_process(tmp_path: Path) -> None:
    torch.save(Ends(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="ends the process with .*; guard"):
        lmkan_deploy.load_checkpoint(tmp_path / "model.pt", trust_pickle=True)


def test_a_signal_ends_the_process_in_the_users_code_too(folders: tuple[Path, Path]) -> None:
    (folders[0] / "zz_models.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\n")
    before = {number: signal.signal(number, cli._end) for number in cli._ENDING}
    try:
        with pytest.raises(SystemExit) as ended:
            load(folders[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 143
