"""The command line's verbs as functions: `export`, `optimize`, `verify`, `run`, `bench`, `inspect`."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkan_deploy.acceptance import allowed_error, own_tolerance, require_agreement, require_passed
from lmkan_deploy.errors import CheckpointError, EngineError, ExportError, InputError, LibraryError
from lmkan_deploy.inspection import ModelInfo, inspect_model
from lmkan_deploy.progress import Progress, Step, no_progress
from lmkan_deploy.runtime.axis_limits import AxisLimits, noted_limits
from lmkan_deploy.runtime.runner import Runner, RuntimeName, load_runner
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec
from lmkan_deploy.spec import DOMAIN, TableDtype
from lmkan_deploy.staging import output_file
from lmkan_deploy.verification import (
    RANDOM_CASE,
    TableCosts,
    Verification,
    check_tolerance,
    random_cases,
    verify_runners,
)
from lmkan_deploy.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from lmkan_deploy.checkpoints import Architecture, Checkpoint
    from lmkan_deploy.converters.passes.base import Outcome, Pass
    from lmkan_deploy.latency import Latency
    from lmkan_deploy.runtime.pytorch import TorchRunner


Feeds = Callable[[list[str]], Mapping[str, "NDArray[Any]"]] | Mapping[str, "NDArray[Any]"]
"""An array for each input of a network, or a function that returns them when it is called with their names."""

MAX_OPSET = 25
"""Newest opset of ONNX's standard operators that PyTorch's exporter converts to."""


@dataclass(frozen=True)
class ExportResult:
    """What an export did.

    Attributes:
        path: The ONNX file; where `output` was a link, the file it points to.
        kind: What the checkpoint was.
        weights_only: Whether it was read as weights only; a trusted one may have run code.
        notes: What the user should know, a line each.
        verification: None where it was not asked for.
        tables: What narrow tables cost; None where all are float32, or nothing was measured.
        info: Summary of the model.
    """

    path: Path
    kind: str
    weights_only: bool
    notes: list[str]
    verification: Verification | None
    tables: TableCosts | None
    info: ModelInfo


def export(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    architecture: Architecture | str | None = None,
    input_shapes: Sequence[str] = (),
    trust_pickle: bool = False,
    key: str | None = None,
    opset: int | None = None,
    passes: Sequence[str] | None = None,
    without_passes: Sequence[str] = (),
    table_dtype: TableDtype | None = None,
    calibration: Feeds | None = None,
    max_error: float | None = None,
    external_data: bool | None = None,
    check: bool = True,
    inputs: Feeds | None = None,
    rtol: float | None = None,
    progress: Progress = no_progress,
) -> ExportResult:
    """Exports a saved network to ONNX and verifies the result.

    The file appears complete and verified, or not at all.

    Args:
        checkpoint: A state dict, a `torch.export` archive, or a pickled module.
        output: The ONNX file; by default the checkpoint's path with the suffix `.onnx`.
        architecture: What builds the network of a state dict; see `Architecture`. A text such as
            `my_models:MethaneNet` is an importable factory without arguments.
        input_shapes: Such as `batch,12` or `x:batch,4,8,8`, where the shapes can't be inferred.
        trust_pickle: Whether the file may run code while it is loaded.
        key: Which network, where a training script saved several in a dict: `ema`, or `state.ema`.
        opset: Version of ONNX's standard operators: 18 to 25; by default 20.
        passes: Names of the graph passes to run; None for all. `lmkan_deploy.converters.passes.PASSES`
            lists them.
        without_passes: Names of passes to leave out; "all" leaves out every pass that can be.
        table_dtype: Element type of the tables in the file: float32 (the default), float16, bfloat16 or
            int8. The model is verified with float32 tables first, then the compiled operator against the
            function with the narrow ones; what those cost is reported, and limited by `rtol` alone.
        calibration: Real inputs. The scales of int8 tables are then those with the least error on
            them, and costs are measured on them, not on `inputs` or random ones.
        max_error: Instead of `table_dtype`: every layer gets the smallest type that keeps the whole model
            within this relative error on the calibration inputs.
        external_data: Whether weights get a file of their own; None decides by their size.
        check: Whether to compare ONNX Runtime with PyTorch, with the compiled operator and without.
        inputs: Inputs to compare on besides random ones.
        rtol: Allowed relative error of every comparison; None takes a default by type.
        progress: Called at each step.

    Raises:
        LibraryError: PyTorch, ONNX Runtime or the native library is missing.
        CheckpointError: The checkpoint can't be read, needs trust, or does not fit the architecture.
        ExportError: The network can't be expressed in ONNX.
        VerificationError: The exported model gives other answers; no file is left.
        ModelError: The file can't be written.
    """
    check_tolerance(rtol)
    _check_comparison(check, rtol, inputs)
    _check_table_options(table_dtype, calibration, max_error)
    if opset is not None and opset > MAX_OPSET:
        raise ExportError(f"expected ONNX opset {MAX_OPSET} or earlier, found {opset}; pass another --opset")
    path = None if output is None else output_file(output)
    _require_pytorch()
    from lmkan_deploy.checkpoints import load_checkpoint
    from lmkan_deploy.converters.model_file import staged_model, temporary_model
    from lmkan_deploy.converters.narrowing import choose_tables
    from lmkan_deploy.converters.passes import select_passes

    selected = select_passes(passes, without_passes)
    progress(Step("loading the checkpoint"))
    architecture = _architecture(architecture)
    loaded = load_checkpoint(checkpoint, architecture, trust_pickle=trust_pickle, key=key)
    _require_use(architecture, loaded)
    if path is None:
        path = output_file(loaded.path.with_suffix(".onnx"))
    if path.exists() and path.samefile(checkpoint):
        raise CheckpointError(f"expected an output other than the checkpoint itself, found {path}; pass -o")
    progress(Step("exporting to ONNX"))
    specs = _input_specs(loaded, input_shapes)
    model = _convert(loaded, specs, opset, selected)
    options = {
        "input_shapes": list(_texts(input_shapes)),
        "arch": None if architecture is None else architecture.factory,
        "arch_args": architecture.arguments if architecture is not None and architecture.factory else None,
        "key": key,
        "trust_pickle": trust_pickle or None,
        "opset": opset,
        "passes": None if passes is None else list(_texts(passes)),
        "no_passes": list(_texts(without_passes)) or None,
        "table_dtype": table_dtype,
        "max_error": max_error,
        "calibrated": calibration is not None or None,
    }
    model.metadata_props.update(_provenance(loaded, options))
    limits = noted_limits(model.metadata_props)
    names = [str(value.name) for value in model.graph.outputs]
    reference = _torch_runner(loaded, specs, names)
    cases = random_cases(specs, limits=limits)
    if inputs is not None:
        cases["given inputs"] = _feeds(inputs, [spec.name for spec in specs])

    def verified(file: Path, cases: Mapping[str, Arrays], allowed: float | None) -> Verification:
        runners = [load_runner(file), load_runner(file, "onnxruntime-function")]
        result = verify_runners(reference, runners, cases, rtol=allowed, progress=progress)
        require_passed(result, "the exported model differs from PyTorch")
        return result

    narrow = table_dtype not in (None, "float32") or max_error is not None
    if check and narrow:
        progress(Step("verifying with float32 tables"))
        with temporary_model(model, path, external_data=external_data) as file:
            verified(file, cases, rtol)
    given = None if calibration is None else _feeds(calibration, [spec.name for spec in specs])
    outcome, costs = choose_tables(model, table_dtype, given, max_error, cases if check else None, progress)
    notes = [*loaded.notes, *(f"the axis {name} takes {sizes}" for name, sizes in limits.items())]
    notes += [f"not narrowed: {line}" for line in outcome.refused]
    progress(Step("writing"))
    with staged_model(model, path, external_data=external_data) as staged:
        verification = None
        if check and narrow:
            require_agreement(staged, cases, rtol, progress)
        if check:
            verification = verified(staged, _telling(cases, given), allowed_error(rtol, narrow))
        info = replace(inspect_model(staged), path=str(path))
    return ExportResult(path, loaded.kind, loaded.weights_only, notes, verification, costs, info)


@dataclass(frozen=True)
class OptimizeResult:
    """What an optimization did.

    Attributes:
        path: The ONNX file written; where `output` was a link, the file it points to.
        outcomes: Pass name -> what it did and refused.
        nodes_before: Number of nodes of the model that was read.
        nodes_after: Number of nodes of the model that was written.
        verification: None where it was not asked for.
        tables: See `ExportResult`.
    """

    path: Path
    outcomes: dict[str, Outcome]
    nodes_before: int
    nodes_after: int
    verification: Verification | None
    tables: TableCosts | None


def optimize(
    model: str | Path,
    output: str | Path,
    *,
    passes: Sequence[str] | None = None,
    without_passes: Sequence[str] = (),
    table_dtype: TableDtype | None = None,
    calibration: Feeds | None = None,
    max_error: float | None = None,
    external_data: bool | None = None,
    check: bool = True,
    rtol: float | None = None,
    progress: Progress = no_progress,
) -> OptimizeResult:
    """Runs the graph passes on an ONNX file that was exported earlier.

    The file appears complete and verified against the one it came from, or not at all.

    Args:
        model: An ONNX file.
        output: The ONNX file to write; may be the same.
        passes: See `export`.
        without_passes: See `export`.
        table_dtype: See `export`; tables that are not float32 stay as they are, if there are others.
        calibration: See `export`.
        max_error: See `export`.
        external_data: See `export`.
        check: Whether to compare the two models in ONNX Runtime, the new one without the compiled operator
            too.
        rtol: See `export`.
        progress: Called at each step.

    Raises:
        ModelError: The file can't be read, run or written.
        ExportError: No table can get the type, because none is float32.
        VerificationError: The new model gives other answers; nothing is written.
    """
    from lmkan_deploy.converters.model_file import load_model, staged_model
    from lmkan_deploy.converters.narrowing import choose_tables, require_wide_tables
    from lmkan_deploy.converters.passes import optimize as run_all
    from lmkan_deploy.converters.passes import select_passes

    selected = select_passes(passes, without_passes)
    check_tolerance(rtol)
    _check_comparison(check, rtol)
    _check_table_options(table_dtype, calibration, max_error)
    narrow = table_dtype not in (None, "float32") or max_error is not None
    path = output_file(output)
    progress(Step("loading"))
    graph = load_model(Path(model))
    before = len(graph.graph)
    progress(Step("rewriting"))
    outcomes = run_all(graph, selected)
    reference = load_runner(model) if check else None
    limits = noted_limits(graph.metadata_props)
    cases = None if reference is None else random_cases(reference.inputs, limits=limits)
    names = [str(value.name) for value in graph.graph.inputs]
    given = None if calibration is None else _feeds(calibration, names)
    require_wide_tables(graph, table_dtype)
    outcomes["table-dtype"], costs = choose_tables(graph, table_dtype, given, max_error, cases, progress)
    progress(Step("writing"))
    verification = None
    with staged_model(graph, path, external_data=external_data) as staged:
        if reference is not None and cases is not None:
            if narrow:
                require_agreement(staged, cases, rtol, progress)
            runners, allowed = [load_runner(staged)], allowed_error(rtol, narrow)
            if allowed is None:
                allowed = own_tolerance(model)
            if any(domain == DOMAIN for domain, _, _ in graph.functions):
                runners.append(load_runner(staged, "onnxruntime-function"))
            telling = _telling(cases, given)
            verification = verify_runners(reference, runners, telling, rtol=allowed, progress=progress)
            require_passed(verification, "the optimized model differs from the original")
    return OptimizeResult(path, outcomes, before, len(graph.graph), verification, costs)


def verify(
    model: str | Path,
    *,
    checkpoint: str | Path | None = None,
    architecture: Architecture | str | None = None,
    input_shapes: Sequence[str] = (),
    trust_pickle: bool = False,
    key: str | None = None,
    inputs: Mapping[str, NDArray[Any]] | None = None,
    outputs: Mapping[str, NDArray[Any]] | None = None,
    reference_model: str | Path | None = None,
    runtimes: Sequence[RuntimeName] = ("onnxruntime", "onnxruntime-function"),
    device: int = 0,
    plugin: str | Path | None = None,
    cuda_graphs: bool = False,
    batch_sizes: int | Sequence[int] | None = None,
    seed: int = 0,
    rtol: float | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Compares a model's runtimes with a reference.

    The reference is the PyTorch network where a checkpoint is given; stored outputs where `outputs` is;
    another model where `reference_model` is; the function that the model carries, in ONNX Runtime, otherwise.

    Args:
        model: An ONNX file, or an engine, which needs a reference.
        checkpoint: Where the model came from.
        architecture: For the checkpoint; see `export`.
        input_shapes: For the checkpoint; see `export`.
        trust_pickle: For the checkpoint; see `export`.
        key: For the checkpoint; see `export`.
        inputs: Inputs by name, compared besides random ones. Required with `outputs`, which then are the
            only case.
        outputs: Expected outputs by name.
        reference_model: Another ONNX file, such as the one with float32 tables. What each layer's narrow
            table costs is then measured as well.
        runtimes: What to compare.
        device: See `load_runner`.
        plugin: See `load_runner`.
        cuda_graphs: See `load_runner`.
        batch_sizes: Sizes of the free axes of random inputs.
        seed: Of the random inputs.
        rtol: Allowed relative error; None takes a default by type, 3e-2 between runtimes of int8 tables.
        progress: Called at each step.

    Raises:
        LmkanError: A file can't be loaded, or the reference does not take an input.
    """
    references = {"checkpoint": checkpoint, "outputs": outputs, "reference_model": reference_model}
    several = [name for name, reference in references.items() if reference is not None]
    if len(several) > 1:
        raise InputError(
            f"expected one thing to compare with, found {' and '.join(several)}; pass one of them"
        )
    of_checkpoint = {"architecture": architecture, "key": key, "input_shapes": list(input_shapes) or None}
    unused = [name for name, value in of_checkpoint.items() if value is not None]
    if checkpoint is None and unused:
        raise InputError(f"expected a checkpoint for {' and '.join(unused)}, found none; pass it")
    if seed < 0:
        raise InputError(f"expected a seed of at least 0, found {seed}")
    runtimes = _texts(runtimes)  # type: ignore[assignment]
    if not runtimes:
        raise InputError("expected a runtime to compare, found none; pass onnxruntime, for example")
    if isinstance(batch_sizes, int):
        batch_sizes = [batch_sizes]
    progress(Step("loading"))
    is_engine = Path(model).suffix == ".engine"
    if is_engine and checkpoint is None and outputs is None and reference_model is None:
        raise EngineError(
            "expected something to compare the engine with, found nothing; pass --reference with the ONNX model, "
            "--checkpoint or --outputs"
        )
    # An engine has a runtime of its own.
    chosen: Sequence[RuntimeName] = ["onnxruntime"] if is_engine else runtimes
    runners = [
        load_runner(
            model,
            name,
            device=device if is_engine or name == "onnxruntime-cuda" else 0,
            plugin=plugin,
            cuda_graphs=cuda_graphs,
        )
        for name in chosen
    ]
    given = {"given inputs": dict(inputs)} if inputs is not None else {}
    if outputs is not None:
        if inputs is None:
            raise CheckpointError("expected inputs beside the expected outputs, found none; pass --inputs")
        return verify_runners({"given inputs": dict(outputs)}, runners, given, rtol=rtol, progress=progress)
    limits = _limits_of(model, reference_model)
    if batch_sizes is None:
        cases = random_cases(runners[0].inputs, seed=seed, limits=limits) | given
    else:  # as asked for, but for steps
        steps = {name: AxisLimits(step=found.step) for name, found in limits.items()}
        cases = random_cases(runners[0].inputs, seed=seed, sizes=batch_sizes, limits=steps) | given
    reference: Runner
    if checkpoint is not None:
        _require_pytorch()
        from lmkan_deploy.checkpoints import load_checkpoint

        loaded = load_checkpoint(checkpoint, _architecture(architecture), trust_pickle=trust_pickle, key=key)
        names = [spec.name for spec in runners[0].outputs]
        reference = _torch_runner(loaded, _input_specs(loaded, input_shapes), names)
    elif reference_model is not None:
        reference = load_runner(reference_model)
        if rtol is None and not is_engine and own_tolerance(reference_model) is not None:
            rtol = own_tolerance(model)
        result = verify_runners(reference, runners, cases, rtol=rtol, progress=progress)
        costs = None if is_engine else _layer_costs(model, reference_model, given or cases, progress)
        return replace(result, reference=str(reference_model), tables=costs)
    else:
        rtol = own_tolerance(model) if rtol is None else rtol
        reference = load_runner(model, "onnxruntime-function")
        # Comparing it with itself would say nothing.
        runners = [runner for runner in runners if runner.name != reference.name]
        if not runners:
            runners = [load_runner(model, "onnx-reference")]
    return verify_runners(reference, runners, cases, rtol=rtol, progress=progress)


def run(
    model: str | Path,
    feeds: Mapping[str, NDArray[Any]],
    *,
    runtime: RuntimeName = "onnxruntime",
    threads: int | None = None,
    device: int = 0,
    plugin: str | Path | None = None,
    cuda_graphs: bool = False,
) -> Arrays:
    """Loads a model and runs it once; keep a `load_runner` for more calls.

    Args:
        model: An ONNX file or an engine.
        feeds: Every input by name.
        runtime: See `load_runner`.
        threads: See `load_runner`.
        device: See `load_runner`.
        plugin: See `load_runner`.
        cuda_graphs: See `load_runner`.

    Returns:
        Every output by name.

    Raises:
        LmkanError: The model can't be loaded, or the arrays don't fit its inputs.
    """
    runner = load_runner(
        model, runtime, threads=threads, device=device, plugin=plugin, cuda_graphs=cuda_graphs
    )
    return runner.run(feeds)


def bench(
    models: str | Path | Sequence[str | Path],
    *,
    runtimes: Sequence[RuntimeName] = ("onnxruntime",),
    batch_sizes: int | Sequence[int] = (1, 64, 1024),
    inputs: Feeds | None = None,
    threads: int | None = None,
    device: int = 0,
    plugin: str | Path | None = None,
    cuda_graphs: bool = False,
    seconds: float = 1.0,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[Latency]:
    """Times models, in turns: an exported network against the MLP it replaces, or against its own fallback.

    A call goes from arrays in the host's memory to arrays there. Random inputs differ from call to call.

    Args:
        models: ONNX files, of any network, and engines.
        runtimes: What to run each ONNX file with; see `RuntimeName`. An engine has one of its own.
        batch_sizes: Sizes of the leading free axes of random inputs; others are short.
        inputs: Inputs to time instead of random ones.
        threads: Threads of one call on the CPU; None leaves the choice to the runtime.
        device: See `load_runner`.
        plugin: See `load_runner`.
        cuda_graphs: See `load_runner`.
        seconds: For each model at each batch size.
        seed: Of the random inputs.
        progress: Called at each step.

    Returns:
        By batch size, then in the order of models and runtimes.

    Raises:
        LmkanError: A model can't be loaded, or does not take an input.
    """
    from lmkan_deploy.latency import Contender, measure

    paths = [models] if isinstance(models, str | Path) else list(models)
    has_engine = any(Path(path).suffix == ".engine" for path in paths)
    contenders = []
    for done, path in enumerate(paths):
        progress(Step(f"loading {path}", done, len(paths)))
        is_engine = Path(path).suffix == ".engine"
        # What only engines have is refused, rather than ignored, where there are none.
        for_engine = is_engine or not has_engine
        chosen: Sequence[RuntimeName] = ["onnxruntime"] if is_engine else _texts(runtimes)  # type: ignore[assignment]
        for name in chosen:
            runner = load_runner(
                path,
                name,
                threads=threads,
                device=device if for_engine or name == "onnxruntime-cuda" else 0,
                plugin=plugin if for_engine else None,
                cuda_graphs=cuda_graphs and for_engine,
            )
            given = None if inputs is None else _feeds(inputs, [spec.name for spec in runner.inputs])
            contenders.append(Contender(str(path), runner, given, _limits_of(path, None)))
    sizes: Sequence[int | None] = [batch_sizes] if isinstance(batch_sizes, int) else batch_sizes
    if inputs is not None:
        sizes = [None]
    elif not any(
        isinstance(axis, str | None) for c in contenders for spec in c.runner.inputs for axis in spec.shape
    ):
        sizes = sizes[:1]  # all batches are fixed
    return measure(contenders, sizes, seconds=seconds, seed=seed, progress=progress)


def inspect(model: str | Path) -> ModelInfo:
    """Summary of an ONNX model; see `ModelInfo`."""
    return inspect_model(model)


def _layer_costs(
    model: str | Path, reference_model: str | Path, cases: Mapping[str, Arrays], progress: Progress
) -> TableCosts | None:
    from lmkan_deploy.calibration import Calibration
    from lmkan_deploy.converters.model_file import load_model
    from lmkan_deploy.converters.passes.base import all_lookups, table_dtype_of

    narrowed, wide = load_model(Path(model)), load_model(Path(reference_model))
    if [table_dtype_of(n) for n in all_lookups(narrowed)] == [table_dtype_of(n) for n in all_lookups(wide)]:
        return None
    return Calibration(wide, cases).costs_of(narrowed, progress)


def _require_use(architecture: Architecture | None, loaded: Checkpoint) -> None:
    """Refuses a factory that built nothing, rather than note it in the model."""
    has_network = loaded.kind in ("exported program", "pickled module")
    if has_network and architecture is not None and architecture.factory is not None:
        raise CheckpointError(
            f"expected no --arch beside a file's own network, found {architecture.factory} for {loaded.path} "
            f"({loaded.kind}); leave it out"
        )


def _telling(cases: Mapping[str, Arrays], calibration: Arrays | None) -> Mapping[str, Arrays]:
    """Inputs that tell what narrow tables cost: real ones where there are any."""
    if calibration is None:
        return cases
    given = {name: feeds for name, feeds in cases.items() if not name.startswith(RANDOM_CASE)}
    return {"calibration": dict(calibration), **given}


def _check_comparison(check: bool, rtol: float | None, inputs: Feeds | None = None) -> None:
    if check:
        return
    for option, found, purpose in (
        ("--inputs", inputs, "are compared on"),
        ("--rtol", rtol, "limits errors"),
    ):
        if found is not None:
            raise ExportError(
                f"expected --verify with {option}, which {purpose}, found none; leave out --no-verify"
            )


def _check_table_options(
    table_dtype: TableDtype | None, calibration: Feeds | None, max_error: float | None
) -> None:
    if max_error is None:
        if calibration is not None and table_dtype in (None, "float32"):
            raise ExportError(
                "expected narrow tables with --calibration, found float32 ones; pass --table-dtype or --max-error"
            )
        return
    if table_dtype is not None:
        raise ExportError(
            f"expected a largest error or a table type, found {max_error} and {table_dtype}: the error chooses "
            "the types"
        )
    if calibration is None:
        raise ExportError(
            "expected real inputs to measure errors on, found none; pass --calibration with --max-error"
        )
    if not 0 < max_error < math.inf:
        raise ExportError(f"expected a largest error above 0, found {max_error}")


def _feeds(given: Feeds, names: list[str]) -> Arrays:
    return dict(given(names) if callable(given) else given)


def _architecture(given: Architecture | str | None) -> Architecture | None:
    from lmkan_deploy.checkpoints import Architecture

    return Architecture(given) if isinstance(given, str) else given


def _texts(given: Sequence[str]) -> Sequence[str]:
    """A single text is one, not a sequence of letters."""
    return [given] if isinstance(given, str) else given


def _limits_of(model: str | Path, reference_model: str | Path | None) -> dict[str, AxisLimits]:
    """Which sizes the free axes of an ONNX file may have, or of the one that an engine is compared with."""
    import onnx

    for path in (model, reference_model):
        if path is not None and Path(path).suffix != ".engine":
            entries = onnx.load(path, load_external_data=False).metadata_props
            return noted_limits({entry.key: entry.value for entry in entries})
    return {}


def _require_pytorch() -> None:
    for module in ("torch", "onnxscript"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise LibraryError(
                f"expected the package {module}, found none; install lmkan-deploy[export]"
            ) from error


def _input_specs(checkpoint: Checkpoint, input_shapes: Sequence[str]) -> list[TensorSpec]:
    from lmkan_deploy.checkpoints.exported_program import program_inputs
    from lmkan_deploy.checkpoints.input_shapes import input_specs, parse_input_shape

    if checkpoint.program is not None:
        if input_shapes:
            raise CheckpointError(
                "a torch.export archive holds the shapes of its inputs: leave out --input-shape, or trace the "
                "network again with other dynamic shapes"
            )
        return program_inputs(checkpoint.program)
    return input_specs(checkpoint.module, [parse_input_shape(text) for text in _texts(input_shapes)])


def _convert(
    checkpoint: Checkpoint, specs: Sequence[TensorSpec], opset: int | None, passes: Sequence[Pass]
) -> ir.Model:
    from lmkan_deploy.converters.torch_to_onnx import DEFAULT_OPSET, program_to_onnx, to_onnx

    opset = DEFAULT_OPSET if opset is None else opset
    if checkpoint.program is not None:
        model = program_to_onnx(checkpoint.program, specs, opset=opset, passes=passes)
    else:
        model = to_onnx(checkpoint.module, specs, opset=opset, passes=passes)
    found = model.opset_imports.get("", opset)  # none where no standard operator is left
    if found != opset:
        raise ExportError(
            f"expected PyTorch's exporter to write ONNX opset {opset}, found {found}; pass another --opset"
        )
    return model


def _torch_runner(
    checkpoint: Checkpoint, specs: Sequence[TensorSpec], output_names: Sequence[str]
) -> TorchRunner:
    from lmkan_deploy.runtime.pytorch import TorchRunner

    return TorchRunner(checkpoint.module, specs, output_names)


def _provenance(checkpoint: Checkpoint, options: Mapping[str, Any]) -> dict[str, str]:
    """Where a model comes from, for its metadata; options that are None were not given."""
    import onnx
    import torch

    return {
        "lmkan_deploy.version": __version__,
        "lmkan_deploy.checkpoint": checkpoint.path.name,
        "lmkan_deploy.checkpoint_sha256": checkpoint.sha256(),
        "lmkan_deploy.checkpoint_kind": checkpoint.kind,
        "lmkan_deploy.torch_version": torch.__version__,
        "lmkan_deploy.onnx_version": onnx.__version__,
        "lmkan_deploy.options": json.dumps({k: v for k, v in options.items() if v is not None}),
    }
