"""The network, from positions in Ångström to an energy in eV.

`lmkan-deploy export --arch model:MethaneNet` imports this file, so it imports nothing that only training
needs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmkan_deploy.nn import LMKAN2DLayer, PreconditionedLMKAN2D

HIDDEN = 32
"""Width of the two hidden layers."""

NUM_GRIDS = 8
"""Cells G of the lookup tables along an axis."""

ATOMS = 5


class MethaneNet(nn.Module):
    """Energy of a methane molecule: 10 distances, then lookup layers 10 -> hidden -> hidden -> 1.

    Distances do not change when the molecule moves or turns. What standardises them and the energy is part
    of the network, so the exported model takes and gives physical units.

    Args:
        hidden: See `HIDDEN`; even.
        num_grids: See `NUM_GRIDS`.
    """

    distance_mean: Tensor
    distance_std: Tensor
    energy_mean: Tensor
    energy_std: Tensor
    first_atoms: Tensor
    second_atoms: Tensor

    def __init__(self, hidden: int = HIDDEN, num_grids: int = NUM_GRIDS) -> None:
        super().__init__()
        # A lookup layer sees neighbouring features together; other orders of the distances do as well.
        first, second = torch.triu_indices(ATOMS, ATOMS, offset=1)
        features = len(first)
        self.register_buffer("distance_mean", torch.zeros(features))
        self.register_buffer("distance_std", torch.ones(features))
        self.register_buffer("energy_mean", torch.zeros(()))
        self.register_buffer("energy_std", torch.ones(()))
        self.register_buffer("first_atoms", first, persistent=False)
        self.register_buffer("second_atoms", second, persistent=False)
        # The linear branches carry the coarse dependence from the first step on; tables alone start as noise
        # whose extrapolated tails three layers amplify.
        self.layers = nn.Sequential(
            PreconditionedLMKAN2D(num_grids, features, hidden, "linear"),
            nn.BatchNorm1d(hidden, affine=False),  # onto the fixed grid of the next layer
            PreconditionedLMKAN2D(num_grids, hidden, hidden, "linear"),
            nn.BatchNorm1d(hidden, affine=False),
            PreconditionedLMKAN2D(num_grids, hidden, 1, "linear"),
        )

    def forward(self, positions: Tensor) -> Tensor:
        """Positions [B, 5, 3] of C, H, H, H, H in Ångström -> energies [B] in eV."""
        features = (self.distances(positions) - self.distance_mean) / self.distance_std
        return self.layers(features).squeeze(-1) * self.energy_std + self.energy_mean

    def distances(self, positions: Tensor) -> Tensor:
        """[B, 5, 3] -> [B, 10]."""
        first, second = (positions.index_select(1, atoms) for atoms in (self.first_atoms, self.second_atoms))
        return torch.linalg.vector_norm(first - second, dim=-1)

    def standardise(self, positions: Tensor, energies: Tensor) -> None:
        """Takes the means and standard deviations from training data."""
        distances = self.distances(positions)
        self.distance_mean.copy_(distances.mean(0))
        self.distance_std.copy_(distances.std(0))
        self.energy_mean.copy_(energies.mean())
        self.energy_std.copy_(energies.std())

    def hessian_regularization(self) -> Tensor:
        """Roughness of all lookup tables, a scalar."""
        terms = [m.get_hessian_regularization() for m in self.modules() if isinstance(m, LMKAN2DLayer)]
        return torch.stack(terms).sum()
