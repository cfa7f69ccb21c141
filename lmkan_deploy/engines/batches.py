"""Splits a batch that is larger than an engine's profile allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lmkan_deploy.engines.profiles import Profile, Shape
from lmkan_deploy.errors import InputError
from lmkan_deploy.runtime.tensors import TensorSpec


def split_batch(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    profiles: Mapping[str, Profile],
    shapes: Mapping[str, Shape],
) -> Iterator[slice]:
    """Parts of the leading axis that the profiles allow, in order.

    A batch is split when the leading axis of every input and output is the same free axis.

    Args:
        inputs: Inputs of the engine.
        outputs: Its outputs.
        profiles: Input name -> shapes.
        shapes: Input name -> shape of what is to be run; they fit `inputs`.

    Yields:
        Slices that cover the batch; a single one of everything where the shapes fit as they are. None where
        the batch is empty.

    Raises:
        InputError: A shape is beyond its profile, and the batch can't be split, or splitting does not help.
    """
    axes = {spec.shape[0] if spec.shape else 0 for spec in (*inputs, *outputs)}
    can_split = len(axes) == 1 and isinstance(next(iter(axes)), str)
    lead = 1 if can_split else 0
    for spec in inputs:
        profile = profiles[spec.name]
        bounds = zip(profile.smallest[lead:], shapes[spec.name][lead:], profile.largest[lead:], strict=True)
        if not all(low <= size <= high for low, size, high in bounds):
            raise InputError(
                f"expected input {spec.name} of a shape from {_text(profile.smallest)} to "
                f"{_text(profile.largest)}, found {_text(shapes[spec.name])}; build the engine with wider "
                "--shapes"
            )
    if not can_split:
        yield slice(None)
        return
    rows = shapes[inputs[0].name][0]
    most = min(profiles[spec.name].largest[0] for spec in inputs)
    least = max(profiles[spec.name].smallest[0] for spec in inputs)
    count = -(-rows // most)
    parts = [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]
    if any(part.stop - part.start < least for part in parts):
        raise InputError(
            f"expected batches of {least} to {most} rows or of a multiple that can be split so, found {rows}; "
            "build the engine with wider --shapes"
        )
    yield from parts


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
