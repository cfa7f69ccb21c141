"""Code that imports upstream's package, with and without it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

import lmkan_deploy
from lmkan_deploy import Architecture, upstream
from networks import UserModel

# The attributes of upstream's layer; its forward needs a GPU, as on a machine without one.
REAL_PACKAGE = """
import torch

class LMKAN2DLayer(torch.nn.Module):
    def __init__(self, num_grids, input_dim, output_dim, **tiles):
        super().__init__()
        self.num_grids, self.input_dim, self.output_dim = num_grids, input_dim, output_dim
        shape = (num_grids + 1, num_grids + 1, output_dim, input_dim // 2)
        self.func_parameter = torch.nn.Parameter(torch.zeros(shape))
        self.register_buffer("borders", torch.zeros(num_grids + 1))

    def forward(self, x):
        raise RuntimeError("CUDA kernels called")
"""


@pytest.fixture
def real_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "lmKAN"
    package.mkdir(parents=True)
    (package / "lmKAN_2d.py").write_text(REAL_PACKAGE)
    (package / "__init__.py").write_text("from .lmKAN_2d import LMKAN2DLayer\n")
    monkeypatch.syspath_prepend(package.parent)
    for name in [name for name in sys.modules if name.split(".")[0] in ("lmKAN", "user_models")]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("lmKAN", "user_models")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def test_stand_in_exists_inside_the_block_alone() -> None:
    assert not upstream.is_installed()
    with upstream.stand_in():
        from lmKAN import LMKAN2DLayer, utilities
        from lmKAN.lmKAN_2d import LMKAN2DLayer as Same

        assert LMKAN2DLayer is Same is upstream.LMKAN2DLayer
        assert len(utilities.get_borders_cdf_grid(5)) == 6
    assert "lmKAN" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        import lmKAN  # noqa: F401


def test_new_stand_ins_are_contiguous_and_loaded_ones_in_the_operators_order(tmp_path: Path) -> None:
    layer = upstream.LMKAN2DLayer(5, 6, 3)
    assert layer.func_parameter.is_contiguous()
    torch.save({f"layer.{key}": value for key, value in layer.state_dict().items()}, tmp_path / "model.pt")
    (tmp_path / "wrapped_layer.py").write_text(
        "import torch\nfrom lmKAN import LMKAN2DLayer\n"
        "def build():\n    net = torch.nn.Module()\n    net.layer = LMKAN2DLayer(5, 6, 3)\n    return net\n"
    )
    architecture = Architecture("wrapped_layer:build", tmp_path)
    loaded = lmkan_deploy.load_checkpoint(tmp_path / "model.pt", architecture).module.layer
    assert loaded.table.is_contiguous()
    x = torch.randn(6, 4)
    torch.testing.assert_close(loaded(x), layer(x), rtol=0, atol=0)


PRUNED = """
import torch
from torch.nn.utils import prune
from lmKAN import LMKAN2DLayer, lmKAN_2d_op

class Pruned(torch.nn.Module):
    def __init__(self, for_good):
        super().__init__()
        self.layer = LMKAN2DLayer(4, 4, 2)
        prune.l1_unstructured(self.layer, "func_parameter", 0.3)
        if for_good:
            prune.remove(self.layer, "func_parameter")

    def forward(self, x):
        return self.layer(x.T).T

class Operator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(5, 5, 2, 2))

    def forward(self, x):
        return lmKAN_2d_op(self.table, x.T, 1024, 512, 8, 8, True, True, False).T
"""


@pytest.mark.parametrize(
    ("name", "arguments"), [("Pruned", [False]), ("Pruned", [True]), ("Operator", [])], ids=str
)
def test_pruned_layers_and_the_bare_operator_are_exported(name: str, arguments: list, tmp_path: Path) -> None:
    (tmp_path / "pruned_network.py").write_text(PRUNED)
    architecture = Architecture(f"pruned_network:{name}", tmp_path, arguments)
    module = architecture.build().eval()
    torch.save(module.state_dict(), tmp_path / "model.pt")
    result = lmkan_deploy.export(
        tmp_path / "model.pt", tmp_path / "m.onnx", architecture=architecture, input_shapes=["batch,4"]
    )
    assert len(result.info.layers) == 1
    x = torch.randn(7, 4)
    (y,) = lmkan_deploy.load_runner(tmp_path / "m.onnx").run({"x": x.numpy()}).values()
    torch.testing.assert_close(torch.from_numpy(y), module(x), rtol=1e-4, atol=1e-5)


def test_the_bare_operator_is_the_layers() -> None:
    layer, x = upstream.LMKAN2DLayer(5, 6, 3), torch.randn(6, 4)
    with upstream.stand_in():
        from lmKAN import lmKAN_2d_op
        from lmKAN.custom_op import lmKAN_2d_op as same

    assert same is lmKAN_2d_op
    tiles = {"block_size_forward": 1024, "block_size_backward": 512, "tile_size_forward": 8}
    tiles |= {"tile_size_backward": 8, "backward_fast_mode": False}
    y = lmKAN_2d_op(layer.func_parameter, x, cdf_grid=True, batch_last=True, **tiles)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="call it as LMKAN2DLayer does"):
        lmKAN_2d_op(layer.func_parameter, x, cdf_grid=True, batch_last=False, **tiles)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("from lmKAN import LMKAN3DLayer", "the stand-in .* has .* alone: leave out that import, or install"),
        ("from lmKAN.plots import show", "the stand-in .* has .* alone: leave out that import, or install"),
        ("import no_such_package", "install 'no_such_package', or pass the folder that has both"),
        ("1 / 0", "ZeroDivisionError: division by zero; correct that code"),
        ("def Net():\n    raise ValueError('odd')", "ValueError: odd; correct that code$"),
        ("def Net(width):\n    pass", "'width'; pass its arguments with --arch-args"),
    ],
)
def test_code_that_fails_names_what_to_do(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "failing_code.py").write_text(code)
    with pytest.raises(lmkan_deploy.LmkanError, match=message):
        Architecture("failing_code:Net", tmp_path).build()


def test_the_real_package_wins(real_package: None) -> None:
    assert upstream.is_installed()
    with upstream.stand_in():
        import lmKAN

        assert lmKAN.LMKAN2DLayer is not upstream.LMKAN2DLayer
    assert "lmKAN" in sys.modules


def test_layers_of_the_real_package_are_exported(
    real_package: None, user_model: UserModel, tmp_path: Path
) -> None:
    checkpoint = lmkan_deploy.load_checkpoint(user_model.state_dict, user_model.architecture)
    assert not any(type(m).__module__.startswith("lmKAN") for m in checkpoint.module.modules())
    with torch.no_grad():
        y = checkpoint.module(torch.from_numpy(user_model.x)).numpy()
    assert abs(y - user_model.y).max() < 1e-5 * abs(user_model.y).max()
    result = lmkan_deploy.export(
        user_model.state_dict,
        tmp_path / "model.onnx",
        architecture=user_model.architecture,
        input_shapes=user_model.input_shapes,
    )
    assert len(result.info.layers) == user_model.num_lookups


def test_a_layer_of_the_real_package_alone(real_package: None) -> None:
    import lmKAN

    layer = lmKAN.LMKAN2DLayer(5, 4, 3)
    twin = upstream.replace_layers(layer)
    assert isinstance(twin, upstream.LMKAN2DLayer)
    assert twin.func_parameter is layer.func_parameter
    assert twin(torch.randn(4, 2)).shape == (3, 2)


def test_a_layer_of_the_real_package_in_two_places(real_package: None) -> None:
    from lmKAN import LMKAN2DLayer

    layer = LMKAN2DLayer(5, 4, 4)
    network = upstream.replace_layers(torch.nn.Sequential(layer, torch.nn.ReLU(), layer))
    assert network[0] is network[2]
    assert network[0].func_parameter is layer.func_parameter
    assert network(torch.randn(4, 3)).shape == (4, 3)


def test_architectures_leave_the_import_path_as_it_was(user_model: UserModel) -> None:
    before = list(sys.path)
    with user_model.architecture.importable():
        pass
    with pytest.raises(lmkan_deploy.LmkanError):
        Architecture("no_such_module:Net", user_model.architecture.path).build()
    assert sys.path == before
