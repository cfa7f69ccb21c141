"""Chains of reshapes and transposes -> the shortest equal chain.

The patches of a convolution, and networks written for upstream's batch-last layers, are long chains of them.
A chain is followed with every axis split into *atoms*, the smallest blocks that the whole chain moves
without splitting them; what it does is then one order of the atoms: at most a Reshape into atoms, a
Transpose, and a Reshape out of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lmkan_deploy.converters.passes.base import (
    Outcome,
    add_constant,
    bypass,
    fresh_name,
    is_op,
    name_of,
    used_once,
)

_LAYOUT = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")


def simplify_layout(model: ir.Model) -> Outcome:
    """Replaces every chain of at least two operators that a shorter one can replace."""
    outcome = Outcome()
    for node in list(model.graph):
        if node.graph is None or not is_op(node, *_LAYOUT):
            continue
        output = node.outputs[0]
        if used_once(output) and is_op(next(iter(output.uses())).node, *_LAYOUT):
            continue  # in the middle of a chain
        chain = _chain_to(node)
        replacement = _shortest(chain)
        before = " ".join(n.op_type for n in chain)
        if isinstance(replacement, str):
            if len(chain) > 1:
                outcome.refused.append(f"{name_of(node)}: {before} stays: {replacement}")
            continue
        if len(replacement) >= len(chain):
            continue
        _replace(model.graph, chain, replacement)
        outcome.applied.append(
            f"{name_of(node)}: {before} -> {' '.join(k for k, _ in replacement) or 'nothing'}"
        )
    return outcome


Step = tuple[str, list[int]]
"""("Transpose", permutation) or ("Reshape", shape with -1 for the free axis)."""


@dataclass(eq=False)  # two atoms of one size are still two
class _Atom:
    """A block of elements that stays together.

    Attributes:
        size: Number of elements; None for the free one, of which a chain has one at most.
        parts: The atoms it turned out to consist of.
    """

    size: int | None
    parts: list[_Atom] = field(default_factory=list)

    def leaves(self) -> list[_Atom]:
        return [leaf for part in self.parts for leaf in part.leaves()] if self.parts else [self]


def _chain_to(node: ir.Node) -> list[ir.Node]:
    """The layout operators that end in a node, each used by the next alone."""
    chain = [node]
    while True:
        value = chain[0].inputs[0]
        producer = None if value is None else value.producer()
        if value is None or producer is None or not is_op(producer, *_LAYOUT) or not used_once(value):
            return chain
        chain.insert(0, producer)


def _shape(value: ir.Value | None) -> list[int | None] | None:
    """Sizes with None for the free axis; None when unknown, or when several axes are free."""
    if value is None or value.shape is None:
        return None
    sizes = [size if isinstance(size, int) else None for size in value.shape]
    return sizes if sizes.count(None) <= 1 and 0 not in sizes else None


def _composed(chain: list[ir.Node]) -> list[Step] | None:
    """One transpose, or none, for a chain of nothing else."""
    axes: list[int] | None = None
    for node in chain:
        permutation = node.attributes.get_ints("perm", ())
        if not permutation and node.inputs[0] is not None and node.inputs[0].shape is not None:
            permutation = tuple(reversed(range(len(node.inputs[0].shape))))
        if not is_op(node, "Transpose") or not permutation:
            return None
        axes = list(permutation) if axes is None else [axes[i] for i in permutation]
    return [] if axes == sorted(axes or []) else [("Transpose", axes or [])]


def _shortest(chain: list[ir.Node]) -> list[Step] | str:
    """The shortest chain that does the same, or why it is not known."""
    composed = _composed(chain)
    if composed is not None:
        return composed
    shapes = [_shape(chain[0].inputs[0]), *(_shape(node.outputs[0]) for node in chain)]
    if any(shape is None for shape in shapes):
        return "a shape is unknown, or has several free axes or an empty one"
    source = shapes[0] or []
    axes = [[_Atom(size)] for size in source]
    origin = list(axes)
    for node, shape in zip(chain, shapes[1:], strict=True):
        assert shape is not None
        if is_op(node, "Transpose"):
            permutation = node.attributes.get_ints("perm", tuple(reversed(range(len(axes)))))
            axes = [axes[i] for i in permutation]
            continue
        regrouped = _regroup([atom for axis in axes for atom in axis], shape)
        if regrouped is None:
            return "a reshape cuts across axes"
        axes = regrouped

    start = [leaf for axis in origin for atom in axis for leaf in atom.leaves()]
    end = [[leaf for atom in axis for leaf in atom.leaves()] for axis in axes]
    return _steps(start, end, source, shapes[-1] or [])


def _regroup(atoms: list[_Atom], shape: list[int | None]) -> list[list[_Atom]] | None:
    """Distributes atoms over the axes of a shape, from the right, splitting atoms where an axis ends."""
    left = [leaf for atom in atoms for leaf in atom.leaves()]
    axes: list[list[_Atom]] = []
    for position in range(len(shape) - 1, -1, -1):
        wanted = shape[position]
        if wanted is None:
            # The free axis takes what the axes before it leave.
            return _regroup_from_left(left, shape[:position], axes)
        axis: list[_Atom] = []
        while wanted > 1:
            atom = left.pop() if left else None
            if atom is None or (atom.size is None and any(other.size != 1 for other in left)):
                return None
            if atom.size is None:
                # The outermost block: as the reshape is valid, its size is a multiple of what is wanted.
                head, tail = _Atom(None), _Atom(wanted)
                atom.parts = [head, tail]
                left.append(head)
                axis.insert(0, tail)
                wanted = 1
            elif wanted % atom.size == 0:
                axis.insert(0, atom)
                wanted //= atom.size
            elif atom.size % wanted == 0:
                head, tail = _Atom(atom.size // wanted), _Atom(wanted)
                atom.parts = [head, tail]
                left.append(head)
                axis.insert(0, tail)
                wanted = 1
            else:
                return None
        axes.insert(0, axis)
    return axes if all(atom.size == 1 for atom in left) else None


def _regroup_from_left(
    atoms: list[_Atom], shape: list[int | None], behind: list[list[_Atom]]
) -> list[list[_Atom]] | None:
    """The axes before the free one, which gets the rest."""
    left = list(atoms)
    axes: list[list[_Atom]] = []
    for wanted in shape:
        axis: list[_Atom] = []
        while wanted is not None and wanted > 1:
            atom = left.pop(0) if left else None
            if atom is None or atom.size is None:
                return None
            if wanted % atom.size == 0:
                axis.append(atom)
                wanted //= atom.size
            elif atom.size % wanted == 0:
                head, tail = _Atom(wanted), _Atom(atom.size // wanted)
                atom.parts = [head, tail]
                axis.append(head)
                left.insert(0, tail)
                wanted = 1
            else:
                return None
        axes.append(axis)
    return [*axes, left, *behind]


def _steps(
    start: list[_Atom], end: list[list[_Atom]], source: list[int | None], target: list[int | None]
) -> list[Step]:
    start = [atom for atom in start if atom.size != 1]
    order = [atom for axis in end for atom in axis if atom.size != 1]
    if order == start:
        return [] if source == target else [("Reshape", _with_free(target))]
    # Neighbours that stay neighbours move as one.
    groups: list[list[_Atom]] = []
    for atom in order:
        position = start.index(atom)
        if groups and position > 0 and start[position - 1] is groups[-1][-1]:
            groups[-1].append(atom)
        else:
            groups.append([atom])
    in_order = sorted(groups, key=lambda group: start.index(group[0]))
    permutation = [in_order.index(group) for group in groups]
    split = [_size(group) for group in in_order]
    moved = [split[i] for i in permutation]
    steps: list[Step] = []
    if split != source:
        steps.append(("Reshape", _with_free(split)))
    steps.append(("Transpose", permutation))
    if moved != target:
        steps.append(("Reshape", _with_free(target)))
    return steps


def _size(group: list[_Atom]) -> int | None:
    result = 1
    for atom in group:
        if atom.size is None:
            return None
        result *= atom.size
    return result


def _with_free(shape: list[int | None]) -> list[int]:
    return [-1 if size is None else size for size in shape]


def _replace(graph: ir.Graph, chain: list[ir.Node], steps: list[Step]) -> None:
    value, last = chain[0].inputs[0], chain[-1]
    assert value is not None
    for index, (kind, numbers) in enumerate(steps):
        name = fresh_name(graph, f"{name_of(last)}.{index}")
        if kind == "Transpose":
            node = ir.node("Transpose", [value], {"perm": numbers}, name=name)
        else:
            shape = add_constant(graph, f"{name}.shape", np.array(numbers, np.int64))
            node = ir.node("Reshape", [value, shape], name=name)
        result = node.outputs[0]
        result.name, result.type = fresh_name(graph, f"{name}.output"), value.type
        if kind == "Transpose" and value.shape is not None:
            result.shape = ir.Shape([value.shape[i] for i in numbers])
        elif index == len(steps) - 1:
            result.shape = last.outputs[0].shape
        else:
            result.shape = ir.Shape([None if size == -1 else size for size in numbers])
        graph.insert_before(last, node)
        value = result
    bypass(last, value)
    for node in reversed(chain[:-1]):
        graph.remove(node, safe=True)
