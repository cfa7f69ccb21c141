"""What users get: light imports, the public names, a wheel that works alone, clean libraries."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import lmkan_deploy
from lmkan_deploy.errors import LibraryError
from lmkan_deploy.runtime import libraries
from networks import make_stack

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "ml_dtypes", "rich", "typer", "tensorrt")

# --- Imports and names -------------------------------------------------------------------------------


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return result.stdout


def test_importing_the_package_is_light() -> None:
    code = "import lmkan_deploy, sys; print(*sys.modules)"
    assert set(python(code).split()).isdisjoint(HEAVY)
    code = "import lmkan_deploy.cli, sys; print(*sys.modules)"
    assert set(python(code).split()).isdisjoint(set(HEAVY) - {"typer", "rich"})


def test_running_a_model_does_not_import_torch() -> None:
    code = "import lmkan_deploy, sys; lmkan_deploy.run, lmkan_deploy.inspect; print(*sys.modules)"
    assert "torch" not in python(code).split()


@pytest.mark.parametrize("missing", ["torch", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named_with_the_extra_that_brings_them(missing: str, tmp_path: Path) -> None:
    torch.save(make_stack(4, 2).state_dict(), tmp_path / "model.pt")
    code = f"""
import sys
sys.modules[{missing!r}] = None  # as if it were not installed
from lmkan_deploy.cli import main
sys.argv = ["lmkan-deploy", "export", {str(tmp_path / "model.pt")!r}]
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "install lmkan-deploy[" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_public_names_resolve() -> None:
    for name in lmkan_deploy.__all__:
        assert getattr(lmkan_deploy, name) is not None
    assert set(lmkan_deploy.__all__) <= set(dir(lmkan_deploy))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lmkan_deploy.nonsense  # noqa: B018


def test_versions_are_written_once() -> None:
    header = (ROOT / "plugins/include/lmkan/lookup2d.h").read_text()
    assert f"#define LMKAN_ABI_VERSION {libraries.ABI_VERSION}\n" in header
    assert lmkan_deploy.__version__ == "0.1.0"


def test_heavy_dependencies_are_imported_where_they_are_used() -> None:
    """No module that serving needs may import torch or onnxscript at its top."""
    serving = ["errors", "spec", "reference", "api", "inspection", "verification", "report", "cli"]
    files = [ROOT / f"lmkan_deploy/{name}.py" for name in serving]
    files += [path for path in (ROOT / "lmkan_deploy/runtime").glob("*.py") if path.name != "pytorch.py"]
    for path in files:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "onnxscript"}, path


# --- Native libraries --------------------------------------------------------------------------------

EXPORTS = {
    "cpu": {
        "lmkan_abi_version",
        "lmkan_version",
        "lmkan_cpu_table_create",
        "lmkan_cpu_table_destroy",
        "lmkan_cpu_table_isa",
        "lmkan_cpu_num_tasks",
        "lmkan_cpu_lookup2d",
    },
    "onnxruntime": {"RegisterCustomOps", "lmkan_abi_version", "lmkan_version"},
}
SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "libpthread.so.0"}


@pytest.mark.parametrize("name", EXPORTS)
def test_libraries_export_their_entry_points_alone(name: str) -> None:
    path = str(lmkan_deploy.get_library_path(name))
    listing = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True)
    assert {line.split()[-1] for line in listing.stdout.splitlines()} == EXPORTS[name]
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert needed <= SYSTEM_LIBRARIES
    unresolved = subprocess.run(["ldd", "-r", path], capture_output=True, text=True, check=True)
    assert "undefined symbol" not in unresolved.stdout + unresolved.stderr


def test_lookup_of_libraries(tmp_path: Path) -> None:
    code = "import lmkan_deploy; print(lmkan_deploy.get_library_path('cpu'))"
    default = Path(python(code).strip())
    assert default.is_absolute()
    (tmp_path / default.name).write_bytes(default.read_bytes())
    assert Path(python(code, LMKAN_DEPLOY_LIBRARY_DIR=str(tmp_path)).strip()).parent == tmp_path
    with pytest.raises(LibraryError, match=r"expected a library of cpu, .*, found 'gpu'"):
        lmkan_deploy.get_library_path("gpu")


def test_missing_foreign_and_old_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lmkan_deploy.get_library_path("cpu")
    monkeypatch.setenv(libraries.ENVIRONMENT_VARIABLE, str(tmp_path))
    find = libraries.get_library_path.__wrapped__
    with pytest.raises(LibraryError, match="found none; install"):
        find("cpu")
    (tmp_path / real.name).write_bytes(b"not a library")
    with pytest.raises(LibraryError, match="could not load"):
        find("cpu")
    (tmp_path / real.name).unlink()  # a new file: the loader remembers the old one
    (tmp_path / real.name).write_bytes(real.read_bytes())
    monkeypatch.setattr(libraries, "__version__", "9.9.9")
    with pytest.raises(LibraryError, match=r"expected lmkan-deploy 9\.9\.9 .*found 0\.1\.0"):
        find("cpu")


# --- The wheel ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def test_wheel_contents(wheel: Path) -> None:
    assert re.fullmatch(r"lmkan_deploy-0\.1\.0-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    files = [p for p in (ROOT / "lmkan_deploy").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    sources = {str(p.relative_to(ROOT)) for p in files}
    packaged = {name for name in names if not name.startswith("lmkan_deploy-0.1.0.dist-info/")}
    libraries_built = {"lmkan_deploy/lib/liblmkan_cpu.so", "lmkan_deploy/lib/liblmkan_onnxruntime.so"}
    assert packaged == sources | libraries_built
    assert {name.split("/")[0] for name in packaged} == {"lmkan_deploy"}  # never `cli` or `converters`


def test_an_installed_wheel_runs_a_model(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own: the wheel, and the dependencies of this one."""
    import onnxruntime

    torch.save(make_stack(6, 8, 2).state_dict(), tmp_path / "model.pt")
    lmkan_deploy.export(tmp_path / "model.pt", tmp_path / "model.onnx")
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    subprocess.run([binaries / "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    site = Path(onnxruntime.__file__).parent.parent
    next((tmp_path / "venv/lib").glob("python*/site-packages")).joinpath("dependencies.pth").write_text(
        f"{site}\n"
    )
    code = """
import lmkan_deploy, numpy, pathlib, sys
assert "venv/lib" in lmkan_deploy.__file__, lmkan_deploy.__file__
assert "venv/lib" in str(lmkan_deploy.get_library_path())
x = numpy.ones((3, 6), numpy.float32)
print(lmkan_deploy.run("model.onnx", {"x": x})["y"].shape)
"""
    result = subprocess.run(
        [binaries / "python", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.stdout == "(3, 2)\n", result.stderr
    listing = subprocess.run(
        [binaries / "lmkan-deploy", "inspect", "model.onnx"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert "present" in listing.stdout, listing.stderr
