"""Files of arrays: what is read, and what each kind of wrong file is told."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lmkan_deploy.commands.arrays import read_arrays
from lmkan_deploy.errors import InputError

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_arrays_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.savez_compressed(tmp_path / "x.npz", x=X, y=X + 1)
    np.testing.assert_array_equal(read_arrays(tmp_path / "x.npy", ["a"])["a"], X)
    np.testing.assert_array_equal(read_arrays(tmp_path / "x.npz", ["y"])["y"], X + 1)


def fails(path: Path, *parts: str) -> None:
    with pytest.raises(InputError) as error:
        read_arrays(path, ["x"])
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert "pickle" not in str(error.value)


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    fails(path, f"found no file {path}; check the path")
    fails(tmp_path, f"found the folder {tmp_path}; pass a file of it")
    path.write_text("1.0, 2.0")
    fails(path, "found another kind of file", "save arrays with numpy.save or numpy.savez")
    path.write_bytes(b"")
    fails(path, "found the empty file", "save arrays with numpy.save or numpy.savez")
    np.save(path, np.array([{}], dtype=object))
    fails(path, "it holds Python objects; convert them")
    np.savez(tmp_path / "x.npz", x=np.array([{}], dtype=object))
    fails(tmp_path / "x.npz", "it holds Python objects; convert them")


def test_damaged_headers(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, X)
    content = path.read_bytes()
    for old, new in (
        (b"{'descr'", b"{{{{{{{{"),
        (b"'<f4'", b"'<f4 "),
        (b"(2, 3)", b"(2, 9)"),
        (b"(2, 3)", b"(9**9"),
        (b"'<f4'", b"'<q9'"),
        (b"(2, 3), }          ", b"(99999999999999,), }"),
    ):
        path.write_bytes(content.replace(old, new))
        fails(path, "could not read", "; the file is damaged")
    for size in (8, 20, len(content) - 1):
        path.write_bytes(content[:size])
        fails(path, "could not read", "; the file is damaged: copy it again, or save it again")
    path.write_bytes(content.replace(b"(2, 3)", b"(2,-3)"))
    if np.lib.NumpyVersion(np.__version__) < "2.4.0":  # 2.2 takes a negative size for one to be found
        np.testing.assert_array_equal(read_arrays(path, ["x"])["x"], X)
    else:
        fails(path, "could not read", "; the file is damaged")


def test_archives_of_other_programs(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    path = tmp_path / "x.npz"
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.write(tmp_path / "x.npy", "x.npy")
        np.testing.assert_array_equal(read_arrays(path, ["x"])["x"], X)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "x.npy", "x.npy")
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[8:10] = content[entry + 10 : entry + 12] = bytes([97, 0])  # WavPack's compression
    path.write_bytes(content)
    fails(path, "could not read", "; save it again with numpy.savez")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "text")
    fails(path, "found 'readme.txt'", "save them with numpy.savez")


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed], ids=lambda save: save.__name__)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_are_one_line_or_read(save, tmp_path: Path) -> None:
    path = tmp_path / ("x.npy" if save is np.save else "x.npz")
    save(path, X)
    content, generator = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 3])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            read_arrays(path, ["x"])
        except InputError as error:
            message = str(error)
        else:
            continue
        assert "\n" not in message
        assert "; " in message
