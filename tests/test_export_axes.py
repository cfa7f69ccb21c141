"""Free axes of exported models: the sizes that a network takes are found, noted and kept to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lmkan_deploy
from exported import RUNTIMES, export_module
from lmkan_deploy.errors import ExportError, InputError
from lmkan_deploy.nn import LMKAN2DLayer, LMKANConv2d
from lmkan_deploy.runtime.axis_limits import noted_limits
from lmkan_deploy.runtime.runner import load_runner
from networks import make_stack


def test_a_batch_that_is_not_free_is_an_error(tmp_path: Path) -> None:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lmkan = LMKAN2DLayer(4, 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lmkan(x) + torch.ones(4, 2)

    with pytest.raises(ExportError, match="batch"):
        export_module(Fixed(), tmp_path / "model.onnx", "batch,4")


@pytest.mark.parametrize(("least", "most"), [(None, 16), (5, None), (3, 6)])
def test_axes_of_an_archive_keep_their_limits(least: int | None, most: int | None, tmp_path: Path) -> None:
    network = make_stack(6, 4).eval()
    bounded = torch.export.Dim("batch", **{k: v for k, v in {"min": least, "max": most}.items() if v})
    program = torch.export.export(network, (torch.randn(5, 6),), dynamic_shapes=({0: bounded},))
    torch.export.save(program, tmp_path / "m.pt2")
    result = lmkan_deploy.export(tmp_path / "m.pt2")
    sizes = {int(c.case.split()[-1]) for c in result.verification.comparisons}
    assert sizes == {max(min(size, most or size), least or 1) for size in (1, 2, 7, 64)}
    # The file says so to later checks, rewrites among them.
    again = lmkan_deploy.optimize(result.path, tmp_path / "again.onnx", table_dtype="float16")
    for path in (result.path, again.path):
        checked = lmkan_deploy.verify(path, checkpoint=tmp_path / "m.pt2", rtol=0.1)
        assert {int(c.case.split()[-1]) for c in checked.comparisons} == sizes
        assert checked.passed
    asked = lmkan_deploy.verify(result.path, batch_sizes=[100])
    assert [c.case for c in asked.comparisons] == ["random 100"]


class Patches(torch.nn.Module):
    """Cuts images into patches of a size, which images must be multiples of."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.patch = LMKAN2DLayer(6, 2 * size * size, 8)
        self.head = LMKAN2DLayer(6, 8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        s = self.size
        y = x.reshape(b, c, h // s, s, w // s, s).permute(0, 2, 4, 1, 3, 5)
        return self.head(self.patch(y.reshape(b, (h // s) * (w // s), c * s * s)).mean(1))


class Strides(torch.nn.Module):
    """Needs images of a least size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LMKANConv2d(6, 2, 8, kernel_size=3, padding=1)
        self.second = LMKANConv2d(6, 8, 8, kernel_size=2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("network", "least", "step"),
    [(Patches(2), 2, 2), (Patches(3), 3, 3), (Patches(7), 7, 7), (Strides(), 4, 1)],
)
def test_images_of_every_size_that_the_network_takes(
    network: torch.nn.Module, least: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = network.eval()
    monkeypatch.setattr("test_export_axes.image_network", lambda: network, raising=False)
    torch.save(network.state_dict(), tmp_path / "m.pt")
    result = lmkan_deploy.export(
        tmp_path / "m.pt", architecture="test_export_axes:image_network", input_shapes="batch,2,height,width"
    )
    sizes = f"{'sizes' if step == 1 else f'multiples of {step}'} from {least} on"
    assert result.notes[-2:] == [f"the axis height takes {sizes}", f"the axis width takes {sizes}"]
    assert result.info.inputs == ["x float32[batch, 2, height, width]"]
    runners = [load_runner(result.path, runtime) for runtime in RUNTIMES]
    for batch, height, width in ((1, least, least), (3, least, 5 * step + least), (2, 64 * step, 20 * step)):
        x = torch.randn(batch, 2, height, width)
        want = network(x).detach().numpy()
        for runner in runners:
            np.testing.assert_allclose(runner.run({"x": x.numpy()})["y"], want, rtol=1e-4, atol=1e-5)
    # Later checks keep to them.
    assert lmkan_deploy.verify(result.path, batch_sizes=[5, 6]).passed
    assert len(lmkan_deploy.bench(result.path, batch_sizes=[5], seconds=0.01)) == 1
    if step > 1:
        x = np.zeros((1, 2, step, step + 1), np.float32)
        with pytest.raises(
            InputError, match=rf"with width in multiples of {step}, found shape \[1, 2, {step},"
        ):
            runners[0].run({"x": x})


def test_sizes_that_no_step_allows_are_refused(tmp_path: Path) -> None:
    class Square(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = LMKAN2DLayer(6, 2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer((x + x.transpose(2, 3)).mean((2, 3)))

    with pytest.raises(ExportError, match=r"The size of tensor a \(12\) must match .* check --input-shape"):
        export_module(Square().eval(), tmp_path / "m.onnx", "b,2,h,w")
    export_module(Square().eval(), tmp_path / "m.onnx", "b,2,h,h")


def test_multiples_of_an_archive(tmp_path: Path) -> None:
    network = Patches(2).eval()

    def save(height: object, width: object) -> Path:
        dynamic = ({0: torch.export.Dim("batch"), 2: height, 3: width},)
        program = torch.export.export(network, (torch.randn(3, 2, 8, 12),), dynamic_shapes=dynamic)
        torch.export.save(program, tmp_path / "m.pt2")
        return tmp_path / "m.pt2"

    result = lmkan_deploy.export(save(*[torch.export.Dim.DYNAMIC] * 2), trust_pickle=True)  # for its guards
    assert result.verification.passed
    assert len([note for note in result.notes if "takes multiples of 2 from 4 on" in note]) == 2
    x = torch.randn(1, 2, 6, 2)
    y = load_runner(result.path).run({"x": x.numpy()})["y"]
    np.testing.assert_allclose(y, network(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    save(2 * torch.export.Dim("rows"), 2 * torch.export.Dim("columns"))
    with pytest.raises(ExportError, match=r"found 2\*s.* computed of others, .* trace .* with Dim\.DYNAMIC"):
        lmkan_deploy.export(tmp_path / "m.pt2", trust_pickle=True)


class Pooled(torch.nn.Module):
    """Takes images of every size without an error, but the mean of nothing is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = LMKANConv2d(5, 3, 8, 4)
        self.head = LMKAN2DLayer(5, 8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.patches(x).mean((2, 3)))


def test_sizes_without_an_answer_are_not_allowed(tmp_path: Path) -> None:
    module = Pooled().eval()
    path = export_module(module, tmp_path / "m.onnx", "batch,3,height,width")
    limits = noted_limits(lmkan_deploy.inspect(path).metadata)
    assert [limits[axis].least for axis in ("height", "width")] == [4, 4]
    assert lmkan_deploy.verify(path).passed
    x = np.random.default_rng(0).standard_normal((2, 3, 9, 6)).astype(np.float32)
    want = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(load_runner(path).run({"x": x})["y"], want, rtol=1e-4, atol=1e-5)
