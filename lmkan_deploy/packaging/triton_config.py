"""`config.pbtxt`, in protobuf's text format."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lmkan_deploy.packaging.source import DATATYPES, PackageError, Settings, Source
from lmkan_deploy.runtime.tensors import TensorSpec


def triton_config(
    source: Source,
    settings: Settings,
    runs_with: str,
    *,
    max_batch: int,
    gpu: bool = False,
    profiles: int = 1,
    libraries: Sequence[str] = (),
    parameters: Sequence[tuple[str, str]] = (),
) -> str:
    """A model's configuration.

    Args:
        source: Its tensors.
        settings: Its name and the delay.
        runs_with: The line that names the backend or the platform.
        max_batch: Most rows of one run; 0 where requests can't be joined.
        gpu: Whether it runs on the GPU.
        profiles: Number of the engine's optimization profiles.
        libraries: Custom-op libraries to load.
        parameters: Of the backend.

    Raises:
        PackageError: A tensor has no axes, for which Triton has no words unless requests are joined.
    """
    scalars = [spec.name for spec in (*source.inputs, *source.outputs) if not spec.shape]
    if scalars:
        raise PackageError(
            f"expected tensors with an axis or more, which Triton asks for, found none in {', '.join(scalars)}; "
            "export a model that gives it one of size 1"
        )
    blocks = [f"name: {quoted(settings.name)}\n{runs_with}\nmax_batch_size: {max_batch}"]
    for kind, specs in (("input", source.inputs), ("output", source.outputs)):
        if specs:
            tensors = ",\n".join(_tensor(spec, batched=max_batch > 0) for spec in specs)
            blocks.append(f"{kind} [\n{tensors}\n]")
    if max_batch > 0:
        blocks.append(f"dynamic_batching {{\n  max_queue_delay_microseconds: {settings.max_delay_us}\n}}")
    kind = "KIND_GPU" if gpu else "KIND_CPU"
    group = [f"kind: {kind}", "count: 1"]
    if profiles > 1:  # which Triton uses the first of, unless they are named
        group.append(f"profile: [ {', '.join(quoted(str(number)) for number in range(profiles))} ]")
    lines = "".join(f"    {line}\n" for line in group)
    blocks.append(f"instance_group [\n  {{\n{lines}  }}\n]")
    if libraries:
        names = ", ".join(map(quoted, libraries))
        blocks.append(f"model_operations {{\n  op_library_filename: [ {names} ]\n}}")
    for key, value in parameters:
        blocks.append(f"parameters {{\n  key: {quoted(key)}\n  value {{ string_value: {quoted(value)} }}\n}}")
    return "\n".join(blocks) + "\n"


def quoted(text: str) -> str:
    """A string in protobuf's text format."""
    return json.dumps(text, ensure_ascii=False)


def _tensor(spec: TensorSpec, *, batched: bool) -> str:
    shape = spec.shape[1:] if batched else spec.shape
    dims = [size if isinstance(size, int) else -1 for size in shape]
    lines = [f"name: {quoted(spec.name)}", f"data_type: TYPE_{DATATYPES[spec.dtype]}"]
    if dims:
        lines.append(f"dims: [ {', '.join(map(str, dims))} ]")
    else:  # a row that is one number: clients see an axis of size 1 more
        lines += ["dims: [ 1 ]", "reshape { shape: [ ] }"]
    return "  {\n" + "".join(f"    {line}\n" for line in lines) + "  }"
