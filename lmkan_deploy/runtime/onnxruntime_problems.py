"""What ONNX Runtime's messages mean to a user of this package, and what helps."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

_LOADING = (
    (
        r"Protobuf parsing failed",
        "expected an ONNX file, found {file}, which is damaged or of another format; copy or export it again",
    ),
    (
        r"Unsupported model IR version: (\d+), max supported IR version: (\d+)",
        "expected an ONNX file of IR version {1} or earlier, found {0} in {file}; install a later release than "
        "ONNX Runtime {release}",
    ),
    (
        r"Opset (\d+) is under development.*Current official support for domain (\S+) is till opset (\d+)",
        "expected opset {2} of {1} or an earlier one, found {0} in {file}; export with --opset, or install a "
        "later release than ONNX Runtime {release}",
    ),
    (
        r"lmkan:(LMKAN2D\w*)\(-?\d+\) is not a registered function/op",
        "expected the function of lmkan::{0} in {file}, which the runtime onnxruntime-function needs, found "
        "none; let lmkan-deploy optimize add it, or use the compiled operators alone, --runtime onnxruntime",
    ),
    (
        r"Fatal error: ([\w.]+:\w+)\(-?\d+\) is not a registered function/op",
        "expected operators that ONNX Runtime {release} has, found {0} in {file}; export the network without "
        "it, or register its library in a session of your own",
    ),
    (
        r"No Op registered for (\w+) with domain_version of (\d+)",
        "expected operators that ONNX Runtime {release} has, found {0} of opset {1} in {file}; export the "
        "network without it, or install a later release",
    ),
    (
        r"NOT_IMPLEMENTED.*implementation for (\w+)",
        "expected operators that ONNX Runtime has for the CPU, found {0} with types that it lacks there; export "
        "model.float(), if need be with --table-dtype, or write the model for another runtime with --no-verify",
    ),
    (
        r"External data path does not exist: \"([^\"]+)\"",
        "expected the weights of {file} in {0}, found no such file; copy it together with the model",
    ),
    (
        r"cannot get file size: No such file or directory \[([^\]]+)\]",  # 1.20 and 1.23
        "expected the weights of {file} in {0}, found no such file; copy it together with the model",
    ),
    (
        r"External initializer: (\S+) offset: \d+ size to read: \d+ given file_length: (\d+)",
        "expected {0} of {file} in its file of weights, found only {1} bytes there; copy the model and its "
        "weights again, or export it again",
    ),
)
"""Regular expression of a message -> what to say, with its groups."""

_OPERATOR = re.compile(r'(LMKAN2D\w*) node "(.*?)": (expected .*)', re.DOTALL)
"""What the compiled operators say themselves."""

# ONNX Runtime names the nodes of an inlined function after it, or, where they have no names, not at all.
_FEATURES = re.compile(
    r"running Reshape node\. Name:'(?:|\w*_inlfunc_\w*LMKAN2D\w*)' Status Message: "
    r".*Input shape:\{([\d,]*)\}, requested shape:\{-1,(\d+),2\}",
    re.DOTALL,
)

_NO_MEMORY = re.compile(r"Failed to allocate memory|bad_alloc|bad allocation")
_NOISE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?")


def ends_at_empty_batches(path: Path, release: str) -> bool:
    """Whether ONNX Runtime of that release would end the process at an empty batch of a model.

    Before 1.25 it does so in `Einsum`, whose name is looked for in the file.
    """
    major, minor = map(int, release.split(".")[:2])
    if (major, minor) >= (1, 25):
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"Einsum") >= 0


def load_problem(file: str, message: str, release: str) -> str:
    """One line for a model that ONNX Runtime does not load.

    Args:
        file: The model's name.
        message: What ONNX Runtime says.
        release: ONNX Runtime's.
    """
    for pattern, words in _LOADING:
        found = re.search(pattern, message, re.DOTALL)
        if found:
            return words.format(*found.groups(), file=file, release=release)
    if own := _OPERATOR.search(message):
        return f"{file}: {_own_words(own)}"
    if _NO_MEMORY.search(message):
        return f"expected memory for {file} and twice its tables, found too little; use narrower tables"
    return (
        f"ONNX Runtime {release} could not load {file}: {_said(message)}; export the model again, or "
        "try another release of ONNX Runtime"
    )


def run_problem(message: str) -> str:
    """One line for a model that ONNX Runtime does not run on inputs whose names, types and ranks fit."""
    if _NO_MEMORY.search(message):
        return (
            "expected memory for the model's intermediate results, found too little; run fewer rows at a time"
        )
    if own := _OPERATOR.search(message):
        return _own_words(own)
    if misfit := _FEATURES.search(message):
        shape, pairs = misfit.groups()
        return (
            "expected features and a table that fit each other in a lookup layer, found features "
            f"[{shape.replace(',', ', ')}] and a table of {pairs} pairs; lmkan-deploy inspect names the layers"
        )
    return (
        f"ONNX Runtime could not run the model: {_said(message)}; check that the network takes inputs of these "
        "sizes and values"
    )


def _own_words(found: re.Match[str]) -> str:
    """What an operator of this package says, which ends in what helps."""
    op_type, name, words = found.groups()
    return f'{op_type} node "{name}": {" ".join(words.split())}'


def _said(message: str) -> str:
    """A message in one line, without codes, and ready for more words."""
    return " ".join(_NOISE.sub("", message).split()).removesuffix(".")
