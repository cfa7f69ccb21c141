"""Engines without a GPU: profiles, manifests, and real builds by TensorRT-RTX, which need none."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tensorrt_rtx

import lmkan_deploy
from lmkan_deploy.engines.batches import Part, padded_sizes, split_batch
from lmkan_deploy.engines.build import build_engine
from lmkan_deploy.engines.device import compute_capability
from lmkan_deploy.engines.manifest import Manifest, check_manifest, manifest_path, read_manifest
from lmkan_deploy.engines.profiles import Profile, ShapeRange, make_profiles, nearest_profile
from lmkan_deploy.errors import EngineError, InputError, LibraryError, ModelError
from lmkan_deploy.progress import Step
from lmkan_deploy.runtime.tensors import TensorSpec
from lmkan_deploy.staging import file_sha256
from networks import ExportedStack, UserModel

SPECS = [TensorSpec("x", ("batch", 12), "float32"), TensorSpec("mask", ("batch", "time", 3), "float32")]


def test_profiles() -> None:
    [profile] = make_profiles(SPECS, ["mask:1x2x3,4x5x3,6x7x3"])
    assert profile["mask"] == ShapeRange((1, 2, 3), (4, 5, 3), (6, 7, 3))
    assert profile["x"] == ShapeRange((1, 12), (64, 12), (1024, 12))
    [profile] = make_profiles(SPECS, ["x:8x12"])
    assert profile["x"] == ShapeRange((8, 12), (8, 12), (8, 12))


def test_several_profiles() -> None:
    texts = ["x:1x12", "mask:1x1x3,8x8x3,512x8x3", "x:2x12,64x12,100x12", "x:101x12,512x12,512x12"]
    mask = ShapeRange((1, 1, 3), (8, 8, 3), (512, 8, 3))
    assert make_profiles(SPECS, texts) == [
        {"x": ShapeRange((1, 12), (1, 12), (1, 12)), "mask": mask},
        {"x": ShapeRange((2, 12), (64, 12), (100, 12)), "mask": mask},
        {"x": ShapeRange((101, 12), (512, 12), (512, 12)), "mask": mask},
    ]
    with pytest.raises(
        EngineError, match="shapes of input mask once, or for each of the 3 .* found them 2 times"
    ):
        make_profiles(SPECS, [*texts, "mask:1x1x3"])
    with pytest.raises(
        EngineError, match="share sizes of axis 'batch', found 1 to 16 for x and 17 to 18 for mask"
    ):
        make_profiles(SPECS, ["x:1x12,2x12,16x12", "mask:17x1x3,18x1x3,18x1x3"])


def test_the_nearest_profile() -> None:
    profiles = [*enumerate(make_profiles(SPECS[:1], ["x:1x12,1x12,512x12", "x:1x12,1024x12,2048x12"]))]

    def nearest(rows: int) -> int | None:
        return nearest_profile(profiles, {"x": (rows, 12)})

    assert [nearest(rows) for rows in (1, 31, 32, 33, 100, 600)] == [0, 0, 0, 1, 1, 1]
    assert nearest(2049) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1x12,2x12,3x12",
            "expected shapes of an input of x, mask, found '1x12,2x12,3x12'; write them as x:MIN",
        ),
        ("y:1x12", "found 'y:1x12'"),
        ("x:1x12,2x12", "expected the smallest, typical and largest shape"),
        ("x:1x12,2x12,axb", "expected the smallest, typical and largest shape"),
        ("x:", "expected the smallest, typical and largest shape"),
        ("x:1x13", r"fit input x float32\[batch, 12\], found 1x13"),
        ("x:12", r"fit input x float32\[batch, 12\], found 12"),
        ("x:4x12,2x12,8x12", "found 4, 2, 8"),
        ("x:0x12,2x12,8x12", "found 0, 2, 8"),
    ],
)
def test_bad_profiles(text: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        make_profiles(SPECS, [text])


# --- Builds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table_dtype", ["float32", "int8"])
def test_user_models_build_without_a_gpu(table_dtype: str, user_model: UserModel, tmp_path: Path) -> None:
    model = lmkan_deploy.export(
        user_model.state_dict,
        tmp_path / "model.onnx",
        architecture=user_model.architecture,
        input_shapes=user_model.input_shapes,
        table_dtype=table_dtype,
        check=False,
    ).path
    steps: list[Step] = []
    manifest = build_engine(model, tmp_path / "m.engine", runtime="tensorrt-rtx", progress=steps.append)
    assert read_manifest(tmp_path / "m.engine") == manifest
    assert manifest.lookup_layers == user_model.num_lookups
    assert manifest.runtime_version == tensorrt_rtx.__version__
    assert manifest.model_sha256 == file_sha256(model)
    assert manifest.plugin_sha256 is None
    assert (tmp_path / "m.engine").stat().st_size > 100_000
    assert any("Building engine" in step.text for step in steps)
    assert any(step.total and step.done == step.total for step in steps)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.engine", "m.engine.json", "model.onnx"]


def test_a_model_that_the_runtime_refuses(stack: ExportedStack, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(stack.onnx)
    del model.functions[:]
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(EngineError, match="tensorrt-rtx could not parse .*NoSuchOperator"):
        build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", runtime="tensorrt-rtx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_an_interrupted_build_leaves_nothing(stack: ExportedStack, tmp_path: Path) -> None:
    def interrupt(step: Step) -> None:
        if "Building" in step.text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(stack.onnx, tmp_path / "m.engine", runtime="tensorrt-rtx", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_bad_calls(stack: ExportedStack, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="expected a runtime of tensorrt, tensorrt-rtx, found 'rtx'"):
        build_engine(stack.onnx, tmp_path / "m.engine", runtime="rtx")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="no timing cache for tensorrt-rtx"):
        build_engine(
            stack.onnx, tmp_path / "m.engine", runtime="tensorrt-rtx", timing_cache=tmp_path / "cache"
        )
    with pytest.raises(EngineError, match=r"expected an output that ends in \.engine, .* found .*m\.plan"):
        build_engine(stack.onnx, tmp_path / "m.plan", runtime="tensorrt-rtx")
    misnamed = tmp_path / "m.engine"
    misnamed.write_bytes(stack.onnx.read_bytes())
    with pytest.raises(EngineError, match="other than the model itself"):
        build_engine(misnamed, misnamed, runtime="tensorrt-rtx")
    misnamed.unlink()
    with pytest.raises(ModelError, match="found no file"):
        build_engine(tmp_path / "none.onnx", tmp_path / "m.engine", runtime="tensorrt-rtx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tensorrt_is_named(
    stack: ExportedStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(LibraryError, match="expected the Python package of tensorrt.*install tensorrt-cu13"):
        build_engine(stack.onnx, tmp_path / "m.engine")


# --- Manifests ---------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> tuple[Path, Manifest, Path]:
    """A file that stands for an engine, its manifest, and its plugin library."""
    path, plugin = tmp_path / "m.engine", tmp_path / "plugin.so"
    path.write_bytes(b"engine")
    plugin.write_bytes(b"plugin")
    manifest = Manifest(
        runtime="tensorrt",
        runtime_version="10.14.1",
        cuda_version=13000,
        compute_capability="9.0",
        plugin_sha256=file_sha256(plugin),
        model="m.onnx",
        model_sha256="0" * 64,
        engine_sha256=file_sha256(path),
        profiles=[{"x": ShapeRange((1, 12), (64, 12), (1024, 12))}],
        axes={"x": ("batch", 12), "y": ("batch", None)},
        lookup_layers=3,
    )
    manifest_path(path).write_text(json.dumps(manifest.to_json()))
    return path, manifest, plugin


def test_a_manifest_that_fits(engine: tuple[Path, Manifest, Path]) -> None:
    path, manifest, plugin = engine
    assert read_manifest(path) == manifest
    check_manifest(path, manifest, runtime_version="10.14.1", compute_capability="9.0", plugin=plugin)
    portable = dataclasses.replace(manifest, compute_capability=None, plugin_sha256=None)
    check_manifest(path, portable, runtime_version="10.14.1", compute_capability="12.0", plugin=None)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"runtime_version": "11.0.0"}, "expected tensorrt 10.14.1, .* found 11.0.0; install that release"),
        ({"compute_capability": "8.9"}, "compute capability 9.0, .* found compute capability 8.9"),
        ({"compute_capability": None}, "compute capability 9.0, .* found no GPU"),
        ({"plugin": None}, "expected the plugin library .* found none"),
    ],
)
def test_manifests_of_other_machines(
    found: dict[str, object], message: str, engine: tuple[Path, Manifest, Path]
) -> None:
    path, manifest, plugin = engine
    here: dict[str, object] = {
        "runtime_version": "10.14.1",
        "compute_capability": "9.0",
        "plugin": plugin,
    }
    with pytest.raises(EngineError, match=message):
        check_manifest(path, manifest, **(here | found))  # type: ignore[arg-type]


def test_damaged_engines_and_other_plugins(engine: tuple[Path, Manifest, Path]) -> None:
    path, manifest, plugin = engine
    plugin.write_bytes(b"another")
    with pytest.raises(EngineError, match="expected the plugin library"):
        check_manifest(path, manifest, runtime_version="10.14.1", compute_capability="9.0", plugin=plugin)
    path.write_bytes(b"engin")
    with pytest.raises(EngineError, match="another or a damaged file"):
        check_manifest(path, manifest, runtime_version="10.14.1", compute_capability="9.0", plugin=plugin)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 2, "profiles": {}}'])
def test_damaged_manifests(content: str, engine: tuple[Path, Manifest, Path]) -> None:
    manifest_path(engine[0]).write_text(content)
    with pytest.raises(EngineError, match="expected (the manifest of an engine|a manifest of format 2)"):
        read_manifest(engine[0])


def test_missing_files(engine: tuple[Path, Manifest, Path], tmp_path: Path) -> None:
    manifest_path(engine[0]).unlink()
    with pytest.raises(EngineError, match="expected a manifest beside the engine"):
        read_manifest(engine[0])
    with pytest.raises(EngineError, match="expected an engine, found no file"):
        read_manifest(tmp_path / "none.engine")


def test_command_line(stack: ExportedStack, tmp_path: Path) -> None:
    def build(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lmkan_deploy.cli", "build", stack.onnx, "-o", "m.engine"]
        return subprocess.run(
            [*map(str, command), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )

    result = build("--runtime", "tensorrt-rtx", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["lookup_layers"] == 2
    one = (tmp_path / "m.engine").stat().st_size
    two = build("--runtime", "tensorrt-rtx", "--shapes", "x:1x10", "--shapes", "x:2x10,64x10,512x10").stdout
    assert re.search("runtime +tensorrt-rtx", two)
    assert re.search("profile 0, input x +1x10 to 1x10, tuned for 1x10", two)
    assert re.search("profile 1, input x +2x10 to 512x10, tuned for 64x10", two)
    assert (tmp_path / "m.engine").stat().st_size > 1.3 * one, "an engine has kernels for each profile"
    wrong = build("--runtime", "tensorrt-rtx", "--shapes", "x:1x1")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)


# --- Running -----------------------------------------------------------------------------------------


def test_without_a_gpu_an_engine_says_what_is_missing(stack: ExportedStack, tmp_path: Path) -> None:
    if compute_capability() is not None:
        pytest.skip("this machine has a GPU")
    build_engine(stack.onnx, tmp_path / "m.engine", runtime="tensorrt-rtx")
    with pytest.raises(LibraryError, match="expected (pycuda|a GPU)"):
        lmkan_deploy.load_runner(tmp_path / "m.engine")


def test_an_engine_is_refused_before_it_is_opened(engine: tuple[Path, Manifest, Path]) -> None:
    path, manifest, _ = engine
    portable = dataclasses.replace(manifest, runtime="tensorrt-rtx", plugin_sha256=None)
    manifest_path(path).write_text(json.dumps(portable.to_json()))
    with pytest.raises(EngineError, match="expected tensorrt-rtx 10.14.1, .* found 1.7"):
        lmkan_deploy.load_runner(path)


BATCH = [TensorSpec("x", ("batch", 12), "float32")]
OUTPUT = [TensorSpec("y", ("batch", 1), "float32")]


def row_profiles(*ranges: tuple[int, int, int]) -> list[Profile]:
    return [{"x": ShapeRange(*((rows, 12) for rows in sizes))} for sizes in ranges]


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 100])
def test_batches_are_split(rows: int) -> None:
    profiles = row_profiles((1, 8, 16))
    parts = [part.rows for part in split_batch(BATCH, OUTPUT, profiles, {"x": (rows, 12)})]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    assert len(parts) == -(-rows // 16)
    assert all(part.stop - part.start <= 16 for part in parts)


@pytest.mark.parametrize(
    ("least", "most", "count", "sizes"),
    [
        (1, 1, 32, (1,)),
        (1, 2, 32, (1, 2)),
        (1, 16, 32, (1, 2, 3, 4, 6, 8, 12, 16)),
        (1, 16, 7, (1, 2, 4, 8, 16)),
        (5, 100, 32, (5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100)),
        (64, 64, 32, (64,)),
        (1, 2**24, 32, tuple(2**bit for bit in range(25))),
    ],
)
def test_padded_sizes(least: int, most: int, count: int, sizes: tuple[int, ...]) -> None:
    assert padded_sizes(BATCH, row_profiles((least, least, most)), count) == sizes


def test_padded_sizes_of_several_profiles() -> None:
    profiles = row_profiles((1, 1, 1), (10, 16, 40), (33, 50, 50))
    assert padded_sizes(BATCH, profiles, 32) == (1, 10, 12, 16, 24, 32, 33, 40, 48, 50)
    assert padded_sizes(BATCH, profiles, 7) == (1, 10, 16, 32, 33, 40, 50)
    found = list(split_batch(BATCH, OUTPUT, profiles, {"x": (52, 12)}, (1, 10, 50)))
    assert found == [Part(slice(0, 50), 2), Part(slice(50, 52), 1, 10)]


def test_batches_are_padded() -> None:
    profiles = row_profiles((1, 1, 16))
    found = list(split_batch(BATCH, OUTPUT, profiles, {"x": (37, 12)}, (4, 8, 16)))
    assert found == [Part(slice(0, 16)), Part(slice(16, 32)), Part(slice(32, 37), padded_to=8)]
    assert list(split_batch(BATCH, OUTPUT, profiles, {"x": (0, 12)}, (4, 16))) == []
    # Rows that depend on each other run as they are.
    whole = [TensorSpec("y", (1,), "float32")]
    assert list(split_batch(BATCH, whole, profiles, {"x": (5, 12)}, (8, 16))) == [Part(slice(None))]


def test_batches_that_cannot_be_split() -> None:
    profiles = row_profiles((4, 8, 16))
    assert list(split_batch(BATCH, OUTPUT, row_profiles((1, 1, 2)), {"x": (0, 12)})) == []
    with pytest.raises(InputError, match="expected batches of 4 to 16 rows .* found 3"):
        list(split_batch(BATCH, OUTPUT, profiles, {"x": (3, 12)}))
    with pytest.raises(InputError, match="shape from 4x12 to 16x12, found 17x12"):
        # The output has no batch to put together again.
        list(split_batch(BATCH, [TensorSpec("y", (1,), "float32")], profiles, {"x": (17, 12)}))


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (1, [(0, 1)]),
        (5, [(0, 5)]),
        (39, [(0, 20), (0, 19)]),  # no profile takes it at once
        (40, [(1, 40)]),
        (64, [(1, 64)]),
        (65, [(1, 64), (0, 1)]),  # too few rows for two of the second profile
        (81, [(1, 40), (1, 41)]),
        (150, [(1, 50)] * 3),
    ],
)
def test_batches_are_split_among_profiles(rows: int, parts: list[tuple[int, int]]) -> None:
    profiles = row_profiles((1, 4, 20), (40, 64, 64))
    found = list(split_batch(BATCH, OUTPUT, profiles, {"x": (rows, 12)}))
    sizes = [(part.profile, part.rows.stop - part.rows.start) for part in found]
    assert sorted(sizes) == sorted(parts)
    assert [row for part in found for row in range(part.rows.start, part.rows.stop)] == list(range(rows))


def test_profiles_differ_in_other_axes_too() -> None:
    specs = [TensorSpec("x", ("batch", "time"), "float32"), TensorSpec("m", ("batch",), "float32")]
    output = [TensorSpec("y", ("batch", 1), "float32")]
    profiles = make_profiles(specs, ["x:1x1,8x8,64x16", "x:1x17,1x32,4x64", "m:1,8,64"])

    def split(x: tuple[int, int]) -> list[Part]:
        return list(split_batch(specs, output, profiles, {"x": x, "m": x[:1]}))

    assert split((64, 16)) == [Part(slice(0, 64), 0)]
    assert split((7, 17)) == [Part(slice(0, 3), 1), Part(slice(3, 7), 1)]
    with pytest.raises(
        InputError, match="input x of a shape from 1x1 to 64x16 or from 1x17 to 4x64, found 7x65"
    ):
        split((7, 65))
    fixed = make_profiles(specs, ["x:2x8", "x:4x8", "m:1,2,4"])
    whole = [TensorSpec("y", (1,), "float32")]
    assert list(split_batch(specs, whole, fixed, {"x": (4, 8), "m": (4,)})) == [Part(slice(None), 1)]
    apart = [
        {"x": fixed[0]["x"], "m": ShapeRange((4,), (4,), (4,))},
        fixed[1] | {"m": ShapeRange((2,), (2,), (2,))},
    ]
    with pytest.raises(InputError, match="one profile of the engine allows together, found x 4x8, m 4"):
        list(split_batch(specs, whole, apart, {"x": (4, 8), "m": (4,)}))
