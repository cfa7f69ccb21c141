"""Libraries with the TensorRT plugin: what is in them, how they are compiled, found and loaded."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lmkan_deploy
from lmkan_deploy.errors import LibraryError
from lmkan_deploy.runtime.tensorrt_plugin import (
    PluginVersions,
    build_tensorrt_plugin,
    find_tensorrt_plugin,
    plugin_versions,
)
from lmkan_deploy.spec import OP_TYPE, QUANTIZED_OP_TYPE
from tensorrt_builds import PLUGIN, needed_by_host_kernels, run


@pytest.mark.parametrize("which", ["host_plugin", "cuda_plugin"])
def test_the_library_exports_two_symbols_and_needs_neither_tensorrt_nor_cuda(
    which: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(which)
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", path).splitlines()}
    assert exported == {"getCreators", "setLoggerFinder"}
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", path)))
    system = {"libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2"}
    assert needed - system == ({"liblmkan_cpu.so"} if which == "host_plugin" else set())
    assert "undefined symbol" not in run("ldd", "-r", path)


# --- Loading -------------------------------------------------------------------------------------------


def open_libraries(*paths: object) -> subprocess.CompletedProcess[str]:
    code = "import ctypes, sys; [ctypes.CDLL(path) for path in sys.argv[1:]]"
    command = [sys.executable, "-c", code, *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_opening_the_second_library_registers_the_plugin(
    folder: Path, headers: Path, host_plugin: Path, tmp_path: Path
) -> None:
    major = re.search(r"define TRT_MAJOR_ENTERPRISE (\d+)", (headers / "NvInferVersion.h").read_text())[1]
    soname = f"libnvinfer.so.{major}"
    run("g++", "-std=c++17", "-fPIC", "-shared", "-isystem", headers, "-idirafter", PLUGIN / "cuda_types",
        PLUGIN / "tests/registry.cc", f"-Wl,-soname,{soname}", "-o", folder / soname)  # fmt: skip
    register = host_plugin.with_name(f"{host_plugin.stem}_register.so")
    opened = open_libraries(folder / soname, register)
    assert (opened.stdout, opened.stderr) == (f"loadLibrary {host_plugin}\n", "")

    opened = open_libraries(register)
    expected = f"lmkan: expected a process with {soname}, found none; load the plugin after TensorRT\n"
    assert (opened.stdout, opened.stderr) == ("", expected)

    alone = tmp_path / register.name
    alone.write_bytes(register.read_bytes())
    opened = open_libraries(folder / soname, alone)
    plugin = tmp_path / host_plugin.name
    assert opened.stderr == f'lmkan: expected TensorRT to load "{plugin}", but it refused; see its log\n'


LOAD = """
import shutil, sys
from pathlib import Path
import tensorrt_rtx as trt
from lmkan_deploy.engines.plugin import load_plugin
from lmkan_deploy.engines.tensorrt_api import make_log
from lmkan_deploy.errors import LmkanError
plugin, folder, broken = map(Path, sys.argv[1:4])
log = make_log(trt)
builder = trt.Builder(log)
def load(path):
    try:
        load_plugin(trt, log, path)
        creators = [c.name for c in trt.get_plugin_registry().all_creators if c.name.startswith("LMKAN")]
        print("loaded", *sorted(creators), flush=True)
    except LmkanError as error:
        print(error, flush=True)
load(broken)
load(plugin)
load(plugin)
load(Path(shutil.copy(plugin, folder / "copied.so")))
(folder / "another.so").write_bytes(plugin.read_bytes() + b"0")
load(folder / "another.so")
"""
LOADED_BEFORE = """
import sys
from pathlib import Path
import tensorrt_rtx as trt
from lmkan_deploy.engines.plugin import load_plugin
from lmkan_deploy.engines.tensorrt_api import make_log
log = make_log(trt)
builder = trt.Builder(log)
assert trt.get_plugin_registry().load_library(sys.argv[1])
load_plugin(trt, log, Path(sys.argv[1]))
print("accepted", flush=True)
load_plugin(trt, log, Path(sys.argv[2]))
"""


def test_a_process_loads_the_plugin_once(cuda_plugin: Path, tmp_path: Path) -> None:
    (tmp_path / "needed.c").write_text("int needed(void) { return 1; }")
    (tmp_path / "broken.c").write_text("int needed(void); int getCreators(void) { return needed(); }")
    run("gcc", "-shared", "-fPIC", tmp_path / "needed.c", "-o", tmp_path / "libneeded.so")
    broken = tmp_path / "broken.so"
    run("gcc", "-shared", "-fPIC", tmp_path / "broken.c", f"-L{tmp_path}", "-lneeded", "-o", broken)
    (tmp_path / "libneeded.so").unlink()
    lines = run(sys.executable, "-c", LOAD, cuda_plugin, tmp_path, broken).splitlines()
    assert re.search(r"could not load the plugin library .*broken\.so: .*libneeded\.so", lines[0]), lines
    assert lines[1:4] == [f"loaded {OP_TYPE} {QUANTIZED_OP_TYPE}"] * 3
    assert re.search(r"that this process has loaded, .* found .*another\.so", lines[4]), lines
    # One that the program itself has loaded is recognized; another one is not taken for it.
    command = [sys.executable, "-c", LOADED_BEFORE, str(cuda_plugin), str(tmp_path / "another.so")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == "accepted\n", result.stderr
    assert "that this process has loaded" in result.stderr


# --- Compiling on a user's machine ---------------------------------------------------------------------


def test_the_cached_plugin_has_both_versions_in_its_name(
    headers: Path, host_kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LDFLAGS", needed_by_host_kernels())
    path = build_tensorrt_plugin(headers, kernels=host_kernels)
    version = version_of(headers)
    name = f"liblmkan_tensorrt-{lmkan_deploy.__version__}-trt{version}.so"
    assert path == tmp_path / "lmkan-deploy/plugins" / name
    assert set(path.parent.iterdir()) == {path, path.with_name(name.replace(".so", "_register.so"))}
    assert ctypes.CDLL(str(path)).getCreators


def version_of(headers: Path) -> str:
    content = (headers / "NvInferVersion.h").read_text()
    parts = ("MAJOR", "MINOR", "PATCH")
    return ".".join(re.search(rf"define TRT_{part}_ENTERPRISE (\d+)", content)[1] for part in parts)


@pytest.mark.parametrize("which", ["host_plugin", "cuda_plugin"])
def test_a_plugin_says_what_it_was_made_from(
    which: str, headers: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    versions = plugin_versions(request.getfixturevalue(which))
    assert versions == PluginVersions(lmkan_deploy.__version__, version_of(headers))
    major = versions.tensorrt.split(".")[0]
    assert versions.fits(f"{major}.99.1")
    assert not versions.fits(f"{int(major) + 1}.0.0")
    (tmp_path / "other.so").write_bytes(b"other")
    with pytest.raises(
        LibraryError, match="expected a TensorRT plugin library of lmkan-deploy, found another"
    ):
        plugin_versions(tmp_path / "other.so")
    with pytest.raises(LibraryError, match="could not read .*: No such file"):
        plugin_versions(tmp_path / "none.so")


def test_the_plugin_for_a_release_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, package = tmp_path / "lmkan-deploy/plugins", tmp_path / "package"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LMKAN_DEPLOY_LIBRARY_DIR", str(package))
    lmkan_deploy.get_library_path.cache_clear()
    release = lmkan_deploy.__version__

    def add(folder: Path, tensorrt: str, made_by: str = release) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"liblmkan_tensorrt-{release}-trt{tensorrt}.so" if folder == cache else "liblmkan_tensorrt.so"
        (folder / name.replace(".so", "_register.so")).touch()
        (folder / name).write_bytes(f"lmkan-deploy {made_by} for TensorRT {tensorrt}\0".encode())
        return folder / name

    with pytest.raises(LibraryError, match="found none; make one with lmkan-deploy plugins build"):
        find_tensorrt_plugin()
    own = add(package, "10.14.1")
    assert find_tensorrt_plugin() == find_tensorrt_plugin("10.13.0.35") == own
    older, newest = add(cache, "10.9.0"), add(cache, "11.1.0")
    assert find_tensorrt_plugin("10.9.0.34") == older
    assert find_tensorrt_plugin("10.13.0") == own  # the newest of the same major release
    assert find_tensorrt_plugin("11.0.0") == newest
    built = add(cache, "10.14.1")
    assert find_tensorrt_plugin("10.14.1") == built  # before the package's
    with pytest.raises(LibraryError, match="plugin libraries for 10.14.1, 10.9.0, 11.1.0; name one"):
        find_tensorrt_plugin()
    with pytest.raises(
        LibraryError, match="for TensorRT 12.0.0, found those for 10.14.1, 10.9.0, 11.1.0, which"
    ):
        find_tensorrt_plugin("12.0.0")
    for path in cache.iterdir():
        path.unlink()
    add(package, "10.14.1", made_by="0.0.9")
    with pytest.raises(LibraryError, match="found none; make one"):
        find_tensorrt_plugin()
    lmkan_deploy.get_library_path.cache_clear()


# The command line of a package in a folder, instead of the one that is installed for editing.
INSTALLED = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
sys.path.insert(0, sys.argv.pop(1))
from lmkan_deploy.cli import main
main()
"""


def test_an_installed_package_makes_plugins(cuda_build: Path, headers: Path, tmp_path: Path) -> None:
    """As in a wheel that was built with CUDA: its libraries, and the sources that it brings."""
    run("cmake", "--install", cuda_build, "--prefix", tmp_path / "site")
    package = tmp_path / "site/lmkan_deploy"
    assert {path.name for path in (package / "lib").iterdir()} == {
        "libcudart_static.a", "liblmkan_cpu.so", "liblmkan_cuda.a", "liblmkan_cuda.so", "liblmkan_onnxruntime.so",
        "liblmkan_onnxruntime_cuda.so", "liblmkan_tensorrt.so", "liblmkan_tensorrt_register.so",
    }  # fmt: skip
    for folder in (package / "plugins").rglob("*"):
        assert folder.name not in ("tests", "CMakeLists.txt")
    shutil.copytree(Path(lmkan_deploy.__file__).parent, package, dirs_exist_ok=True)

    def plugins(*arguments: object) -> str:
        return run(sys.executable, "-c", INSTALLED, package.parent, "plugins", *arguments,
                   XDG_CACHE_HOME=str(tmp_path / "cache"))  # fmt: skip

    assert plugins("path", "tensorrt").strip() == str(package / "lib/liblmkan_tensorrt.so")
    built = Path(plugins("build", "--tensorrt-include", headers).strip())
    assert built.parent == tmp_path / "cache/lmkan-deploy/plugins"
    assert plugins("path", "tensorrt").strip() == str(built)
    assert plugins("path", "tensorrt", "--tensorrt", version_of(headers)).strip() == str(built)
    # It needs nothing of what it was made from.
    shutil.rmtree(package)
    moved = shutil.move(built, tmp_path / "moved.so")
    assert "not found" not in run("ldd", "-r", moved)
    assert not re.search(r"RUNPATH|RPATH|liblmkan", run("readelf", "-d", moved))
    assert run(sys.executable, "-c", "import sys, tensorrt_rtx as trt; b = trt.Builder(trt.Logger()); "
               "print(bool(trt.get_plugin_registry().load_library(sys.argv[1])))", moved) == "True\n"  # fmt: skip


def fake_headers(folder: Path, version: str, body: str = "") -> Path:
    major, minor, patch = version.split(".")
    (folder / "NvInferRuntime.h").write_text(body)
    (folder / "NvInferVersion.h").write_text(
        f"#define NV_TENSORRT_MAJOR {major} //!< major\n"
        f"#define NV_TENSORRT_MINOR {minor}\n#define NV_TENSORRT_PATCH {patch}\n"
    )
    return folder


def test_what_cannot_be_compiled_leaves_nothing(
    headers: Path, host_kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "plugin.so"

    def refused(include_dir: Path, message: str) -> None:
        with pytest.raises(LibraryError, match=message) as caught:
            build_tensorrt_plugin(include_dir, output, kernels=host_kernels)
        assert "\n" not in str(caught.value)
        assert not output.exists()

    folder = tmp_path / "include"
    folder.mkdir()
    refused(folder, r"expected TensorRT's headers \(NvInferRuntime.h, NvInferVersion.h\) in .*, found none")
    (folder / "NvInferRuntime.h").touch()
    (folder / "NvInferVersion.h").touch()
    refused(folder, "expected the version of TensorRT in .*NvInferVersion.h, found none")
    refused(fake_headers(folder, "8.6.1"), "expected TensorRT 10 or later, found 8.6.1")
    broken = fake_headers(folder, "12.0.0", "#error not these\n")
    refused(broken, r"could not compile the plugin against TensorRT 12.0.0 of .*error: #error not these")
    with pytest.raises(LibraryError, match=r"expected an output that ends in \.so, found .*plugin"):
        build_tensorrt_plugin(headers, tmp_path / "plugin", kernels=host_kernels)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    refused(headers, "expected a C\\+\\+ compiler, could not run no-such-compiler")
    assert [path.name for path in tmp_path.iterdir()] == ["include"]
