"""Graph passes, one rewrite a file, in the order in which they run.

A pass works on an `onnx_ir.Model` in place and keeps the function that the model computes for finite
inputs, up to one rounding of the table to float32. The passes run again until none applies, because one
makes room for another.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import onnx_ir as ir

from lmkan_deploy.converters.onnx_function import attach_function
from lmkan_deploy.converters.passes.base import Outcome, Pass, infer_lookup_shapes, name_standard_domain
from lmkan_deploy.converters.passes.cancel_reshapes import cancel_reshapes
from lmkan_deploy.converters.passes.clean_up import clean_up
from lmkan_deploy.converters.passes.drop_constant_pairs import drop_constant_pairs
from lmkan_deploy.converters.passes.fold_linear_branch import fold_linear_branch
from lmkan_deploy.converters.passes.fold_scale_shift import fold_scale_shift
from lmkan_deploy.converters.passes.fold_table_transpose import fold_table_transpose
from lmkan_deploy.converters.passes.share_tables import share_tables
from lmkan_deploy.converters.passes.simplify_layout import simplify_layout
from lmkan_deploy.converters.passes.sink_transposes import sink_transposes
from lmkan_deploy.errors import ExportError

PASSES = (
    Pass("fold-table-transpose", "transposed weights become tables", fold_table_transpose),
    Pass("clean-up", "nodes that compute nothing, and what nothing uses, go", clean_up),
    Pass("sink-transposes", "transposes of batch-last networks meet, and cancel", sink_transposes),
    Pass("cancel-reshapes", "reshapes around a layer that undo each other go", cancel_reshapes),
    Pass("simplify-layout", "chains of reshapes and transposes become the shortest ones", simplify_layout),
    Pass("fold-scale-shift", "BatchNorm, factors and biases go into the table before them", fold_scale_shift),
    Pass("fold-linear-branch", "linear and ReLU-first branches go into the table", fold_linear_branch),
    Pass("drop-constant-pairs", "pairs whose functions are constant go", drop_constant_pairs),
    Pass("share-tables", "equal tables are kept once", share_tables),
)

_ALWAYS = ("fold-table-transpose", "clean-up", "share-tables")
"""What a readable and small model needs; not a matter of choice."""


def select_passes(only: Collection[str] | None = None, without: Collection[str] = ()) -> list[Pass]:
    """Passes by name.

    Args:
        only: Names to run; None for all.
        without: Names to leave out; "all" leaves out every pass that can be left out.

    Raises:
        ExportError: A name is unknown.
    """
    only = [only] if isinstance(only, str) else only  # not a sequence of letters
    without = [without] if isinstance(without, str) else without
    names = [item.name for item in PASSES]
    for name in (*(only or ()), *without):
        if name not in names and name != "all":
            raise ExportError(f"expected a pass of {', '.join(names)}, found {name!r}")
    return [
        item
        for item in PASSES
        if item.name in _ALWAYS
        or (
            (only is None or item.name in only or "all" in only)
            and item.name not in without
            and "all" not in without
        )
    ]


def run_passes(model: ir.Model, passes: Collection[Pass] = PASSES) -> dict[str, Outcome]:
    """Runs passes until none applies.

    Args:
        model: Changed in place.
        passes: What to run, in this order.

    Returns:
        Pass name -> what it did in all rounds, and what it refused in the last one.
    """
    name_standard_domain(model)
    outcomes = {item.name: Outcome() for item in passes}
    changed = True
    while changed:
        changed = False
        for item in passes:
            infer_lookup_shapes(model)
            outcome = item.run(model)
            outcomes[item.name].applied += outcome.applied
            outcomes[item.name].refused = outcome.refused
            changed = changed or bool(outcome.applied)
    return outcomes


def optimize(model: ir.Model, passes: Collection[Pass] = PASSES) -> dict[str, Outcome]:
    """Runs passes, attaches the function, and notes in the metadata what was done.

    Args:
        model: Changed in place.
        passes: What to run.

    Returns:
        What each pass did.
    """
    outcomes = run_passes(model, passes)
    attach_function(model)
    note_outcomes(model, outcomes)
    return outcomes


def note_outcomes(model: ir.Model, outcomes: Mapping[str, Outcome]) -> None:
    """Notes in a model's metadata what passes did, behind what they did to it before, and what they refused
    this time. Passes that ran and did nothing are noted too.
    """
    applied, refused = noted_outcomes(model.metadata_props)
    for name, outcome in outcomes.items():
        applied[name] = applied.get(name, []) + outcome.applied
        refused.pop(name, None)
        if outcome.refused:
            refused[name] = outcome.refused
    for kind, lines in (("applied", applied), ("refused", refused)):
        model.metadata_props[f"lmkan_deploy.passes_{kind}"] = json.dumps(lines)


def noted_outcomes(metadata: Mapping[str, str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What `note_outcomes` noted: pass name -> lines, of what every pass that ran has applied, and of what
    some refused.
    """
    found: list[dict[str, list[str]]] = []
    for kind in ("applied", "refused"):
        try:
            lines = json.loads(metadata.get(f"lmkan_deploy.passes_{kind}", "{}"))
        except ValueError:
            lines = {}
        entries = lines.items() if isinstance(lines, dict) else ()
        # Whatever else there is is somebody else's.
        found.append(
            {
                name: noted
                for name, noted in entries
                if isinstance(noted, list) and all(isinstance(line, str) for line in noted)
            }
        )
    return found[0], found[1]
