"""Training on the CPU, and the regressions that a network has to beat."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from model import MethaneNet
from molecules import Molecules
from numpy.typing import NDArray
from torch import Tensor

STEPS = 3_000
BATCH_SIZE = 256

# The shape of upstream's schedule for this task, in 24 epochs instead of 500 and so at a higher rate.
_LEARNING_RATE = 3e-3
_ANNEAL_FROM = 0.3
_ROUGHNESS_FIRST, _ROUGHNESS_LAST = 1e-1, 1e-5

Report = Callable[[int, float], None]
"""Called with the steps done and the recent training RMSE in meV."""


def schedule(progress: float) -> tuple[float, float]:
    """Learning rate and weight of the Hessian regularisation.

    A strong regularisation makes the network learn the smooth part of the energy first. It decays by
    orders of magnitude to its final value; then the learning rate anneals.

    Args:
        progress: Fraction of the training that is done.
    """
    if progress < _ANNEAL_FROM:
        decades = math.log10(_ROUGHNESS_LAST / _ROUGHNESS_FIRST)
        return _LEARNING_RATE, _ROUGHNESS_FIRST * 10 ** (decades * progress / _ANNEAL_FROM)
    phase = (progress - _ANNEAL_FROM) / (1.0 - _ANNEAL_FROM)
    return 0.5 * _LEARNING_RATE * (1.0 + math.cos(math.pi * phase)), _ROUGHNESS_LAST


def train(train_set: Molecules, report: Report = lambda step, rmse: None) -> MethaneNet:
    """A trained network in eval mode; the same one every time on the same machine.

    Args:
        train_set: Molecules to learn from.
        report: See `Report`.
    """
    torch.manual_seed(0)
    positions, energies = torch.from_numpy(train_set.positions), torch.from_numpy(train_set.energies)
    network = MethaneNet()
    network.standardise(positions, energies)
    optimizer = torch.optim.Adam(network.parameters())
    recent = 0.0
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"], roughness = schedule(step / STEPS)
        batch = torch.randint(len(positions), (BATCH_SIZE,))
        # In units of the standard deviation, for which the schedule's weights are meant.
        error = (network(positions[batch]) - energies[batch]) / network.energy_std
        loss = error.square().mean()
        optimizer.zero_grad()
        (loss + roughness * network.hessian_regularization()).backward()
        optimizer.step()
        recent += (loss.item() - recent) * max(0.02, 1.0 / (step + 1))
        report(step + 1, 1000.0 * math.sqrt(recent) * network.energy_std.item())
    return network.eval()


def baselines(train_set: Molecules, test_set: Molecules) -> dict[str, NDArray[np.float64]]:
    """Predictions for the test set by name of the method, from the simplest to the hardest to beat."""
    network = MethaneNet()
    inputs = [network.distances(torch.from_numpy(m.positions)).double() for m in (train_set, test_set)]
    mean, std = inputs[0].mean(0), inputs[0].std(0)
    known, unknown = ((x - mean) / std for x in inputs)
    target = torch.from_numpy(train_set.energies).double().unsqueeze(1)

    def constant(x: Tensor) -> Tensor:
        return torch.ones(len(x), 1, dtype=x.dtype)

    def linear(x: Tensor) -> Tensor:
        return torch.cat([constant(x), x], 1)

    def quadratic(x: Tensor) -> Tensor:
        first, second = torch.triu_indices(x.shape[1], x.shape[1])
        return torch.cat([linear(x), x[:, first] * x[:, second]], 1)

    methods = {"mean energy": constant, "linear regression": linear, "quadratic regression": quadratic}
    return {
        name: (design(unknown) @ torch.linalg.lstsq(design(known), target).solution).squeeze(1).numpy()
        for name, design in methods.items()
    }
