"""Arrays in .npz and .npy files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lmkan_deploy.errors import InputError

if TYPE_CHECKING:
    from lmkan_deploy.api import Feeds
    from lmkan_deploy.runtime.tensors import Arrays


def tensor_names(model: Path, side: str) -> list[str]:
    """Names of a model's inputs or outputs."""
    if model.suffix == ".engine":
        from lmkan_deploy.runtime.runner import load_runner

        return [spec.name for spec in getattr(load_runner(model), side)]
    from lmkan_deploy.converters.model_file import load_model

    return [str(value.name) for value in getattr(load_model(model).graph, side)]


def read_arrays(path: Path, names: list[str]) -> Arrays:
    """Arrays of a file by name; a single array takes the single name."""
    import lzma
    import struct
    import tokenize
    import zipfile
    import zlib

    import numpy as np

    _check_file(path)
    try:
        content = np.load(path, allow_pickle=False)
        arrays = {key: content[key] for key in content.files} if hasattr(content, "files") else {"": content}
    except MemoryError as error:
        raise InputError(
            f"expected arrays that fit into memory, could not read {path}: {error}; the file is damaged, or the "
            "machine too small"
        ) from error
    except NotImplementedError as error:  # in an archive that another program wrote
        raise InputError(
            f"expected a .npz file as NumPy compresses it, could not read {path}: {error}; save it again with "
            "numpy.savez"
        ) from error
    except (
        *(OSError, ValueError, EOFError, KeyError, TypeError, RuntimeError, SyntaxError, OverflowError),
        *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError),
    ) as error:  # NumPy reads headers as Python, and archives hold what they like
        if "allow_pickle" in str(error):
            raise InputError(
                f"expected arrays of numbers, could not read {path}: it holds Python objects; convert them, "
                "such as with astype('float32')"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"expected a .npz or .npy file of arrays, could not read {path}: {reason}; the file is damaged: copy "
            "it again, or save it again"
        ) from error
    other = next((key for key, array in arrays.items() if not isinstance(array, np.ndarray)), None)
    if other is not None:
        raise InputError(
            f"expected an .npz file of arrays, found {other!r} in {path}, which is none; save them "
            "with numpy.savez"
        )
    if len(arrays) == 1 and len(names) == 1:
        return {names[0]: next(iter(arrays.values()))}
    if names and not hasattr(content, "files"):
        keywords = ", ".join(f"{name}=..." for name in names)
        raise InputError(
            f"expected an .npz file with the arrays {', '.join(names)}, found the single array of {path}; save "
            f"them with numpy.savez(file, {keywords})"
        )
    # A file may hold more than the model needs, such as inputs and expected outputs together.
    missing = [name for name in names if name not in arrays]
    if missing:
        keywords = ", ".join(f"{name}=..." for name in names)
        raise InputError(
            f"expected arrays {', '.join(names)} in {path}, found {', '.join(arrays) or 'none'}; save them with "
            f"numpy.savez(file, {keywords})"
        )
    return {name: arrays[name] for name in names}


def _check_file(path: Path) -> None:
    """Refuses what numpy.load would take for a pickle, in words about unpickling."""
    if os.path.isdir(path):  # unlike pathlib's, it raises nothing
        raise InputError(
            f"expected a .npz or .npy file of arrays, found the folder {path}; pass a file of it"
        )
    if not os.path.exists(path):
        raise InputError(f"expected a .npz or .npy file of arrays, found no file {path}; check the path")
    try:
        with path.open("rb") as file:
            beginning = file.read(6)
    except OSError:
        return  # numpy.load says why
    if not beginning.startswith((b"\x93NUMPY", b"PK")):
        what = "the empty file" if not beginning else "another kind of file,"
        raise InputError(
            f"expected a .npz or .npy file of arrays, found {what} {path}; save arrays with numpy.save "
            "or numpy.savez"
        )


def read_feeds(path: Path | None) -> Feeds | None:
    """Arrays for whatever names a model turns out to have."""
    return None if path is None else lambda names: read_arrays(path, names)


def check_output(output: Path, *read: Path | None) -> None:
    """Refuses an output that would replace what is read.

    Raises:
        InputError: It is one of those files.
    """
    for path in read:
        if path is not None and path.exists() and output.exists() and path.samefile(output):
            raise InputError(
                f"expected a file of its own for the output, found {output}, which is read; pass another -o"
            )


def check_suffix(path: Path) -> None:
    """Refuses a file for arrays whose name says something else.

    Raises:
        InputError: It ends in neither .npz nor .npy.
    """
    if path.suffix not in (".npz", ".npy"):
        raise InputError(f"expected an output that ends in .npz or .npy, found {path}")


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Writes all arrays, or nothing."""
    import numpy as np

    from lmkan_deploy.staging import output_file, reported, staging_folder

    check_suffix(path)
    if path.suffix == ".npy" and len(arrays) != 1:
        raise InputError(f"expected an .npz file for {len(arrays)} outputs, found {path}")
    # NumPy has no bfloat16; float32 holds the same values.
    plain = {k: a.astype(np.float32) if a.dtype.name == "bfloat16" else a for k, a in arrays.items()}
    target = output_file(path)
    with staging_folder(target) as folder, reported(path):
        with (folder / target.name).open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, next(iter(plain.values())))
            else:
                np.savez(file, **plain)  # type: ignore[arg-type]
        (folder / target.name).replace(target)
