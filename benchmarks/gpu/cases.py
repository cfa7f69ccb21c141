"""What is compared, and what is to be reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

UPSTREAM_LEAST_TILE = 4
"""Upstream's tiles are 4, 8, 16 or 32 wide, and must divide both widths of a layer."""


@dataclass(frozen=True)
class Case:
    """A chain of layers; one width more than layers."""

    widths: tuple[int, ...]
    num_grids: int
    batch: int
    tiles: tuple[int, ...]
    """Upstream's, the widest first that its shared memory allows; the fastest one counts."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """How many times as fast as upstream a type of tables should be."""
    most_dense: float | None = None
    """How many times a dense layer's time float32 tables may take."""

    @property
    def name(self) -> str:
        """As in the report."""
        return f"{'->'.join(map(str, self.widths))} G={self.num_grids} batch={self.batch}"

    @property
    def is_small(self) -> bool:
        """Whether it matters what L2 holds before a launch."""
        return self.batch <= 1024

    @property
    def num_inputs(self) -> int:
        """Batches that launches take in turn."""
        return 8 if self.is_small else 4

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Widths of each layer."""
        return list(zip(self.widths[:-1], self.widths[1:], strict=True))


CASES = [
    Case((512, 512), 20, 1 << 20, (16,), {"float32": 1.3, "float16": 2.4, "int8": 3.5}, most_dense=5),
    Case((128, 128), 26, 1024, (8,), {"float32": 3}),
    *(Case((512, 512), 26, batch, (8,), {"float32": 20}) for batch in (1, 16, 64)),
    *(
        Case((n_in, 256, 256, 1), grids, 1 << 18, tiles, {"float32": 1.5, "float16": 3})
        for n_in in (32, 12)
        for grids, tiles in ((12, (16, 8)), (28, (8,)))
    ),
    # What NARROW and SPLIT are for, without targets.
    *(Case((256, 1), grids, 1 << 18, (4,)) for grids in (12, 28)),
    *(Case((256, 256), 12, batch, (16,)) for batch in (256, 1024, 4096)),
]
