"""PyTorch layers whose state is compatible with the upstream `lmKAN` package.

Batch-first: features are the last axis of x, [..., N_in]. Upstream's own class works batch-last;
`lmkan_deploy.upstream` has its stand-in.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import lmkan_deploy.torch_op  # noqa: F401  registers torch.ops.lmkan.lookup2d
from lmkan_deploy.spec import grid_points

Preconditioning = Literal["none", "linear", "relu_first", "relu_last"]
"""What is added to γ·lmKAN(x): nothing, Linear(x), Linear(ReLU(x)) or ReLU(Linear(x))."""


class LMKAN2DLayer(nn.Module):
    """A lookup multivariate Kolmogorov-Arnold layer, [..., N_in] -> [..., N_out].

    Sums trainable functions of two neighbouring features, each bilinear on a grid of G x G cells
    (arXiv 2509.07103). The constructor takes upstream's arguments in upstream's order; those that choose
    CUDA tiles are accepted and kept, and restrict nothing here.

    Attributes:
        func_parameter: [G + 1, G + 1, N_out, N_in / 2], as upstream has it. Its memory is laid out pair
            by pair, so that `table` is a contiguous view.
        borders: Grid points, [G + 1], float32.
    """

    borders: Tensor

    def __init__(
        self,
        num_grids: int,
        input_dim: int,
        output_dim: int,
        block_size_forward: int = 1024,
        block_size_backward: int = 512,
        tile_size_forward: int = 8,
        tile_size_backward: int = 8,
        init_scale: float = 0.1,
        backward_fast_mode: bool = False,
    ) -> None:
        """Args: see the class.

        Raises:
            ValueError: num_grids is below 3, input_dim is not an even positive number, or output_dim is
                not positive.
        """
        super().__init__()
        if input_dim < 2 or input_dim % 2 != 0:
            raise ValueError(f"expected an even input_dim of at least 2, found {input_dim}")
        if output_dim < 1:
            raise ValueError(f"expected an output_dim of at least 1, found {output_dim}")
        borders = torch.tensor(grid_points(num_grids), dtype=torch.float32)
        self.num_grids = num_grids
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.block_size_forward = block_size_forward
        self.block_size_backward = block_size_backward
        self.tile_size_forward = tile_size_forward
        self.tile_size_backward = tile_size_backward
        self.backward_fast_mode = backward_fast_mode
        table = torch.empty(input_dim // 2, num_grids + 1, num_grids + 1, output_dim)
        self.func_parameter = nn.Parameter(table.permute(1, 2, 3, 0))
        self.register_buffer("borders", borders)
        bound = init_scale / math.sqrt(input_dim)
        nn.init.uniform_(self.func_parameter, -bound, bound)

    @property
    def table(self) -> Tensor:
        """The tables in the operator's layout, [N_in / 2, G + 1, G + 1, N_out], a view."""
        return self.func_parameter.permute(3, 0, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N_in] -> [..., N_out]."""
        return torch.ops.lmkan.lookup2d(x, self.table)

    def get_hessian_regularization(self) -> Tensor:
        """Sum over all functions of the mean squared Frobenius norm of their Hessian, a scalar.

        Finite differences at the inner grid points (section 3.5 of the paper).
        """
        return hessian_regularization(self.func_parameter, self.borders)

    def extra_repr(self) -> str:
        """For print(module)."""
        return f"num_grids={self.num_grids}, input_dim={self.input_dim}, output_dim={self.output_dim}"


def hessian_regularization(func: Tensor, grid: Tensor) -> Tensor:
    """Mean over the inner grid points, summed over functions, of f_xx² + 2·f_xy² + f_yy².

    Args:
        func: Function values, [G + 1, G + 1, ...].
        grid: Grid points, [G + 1].

    Returns:
        A scalar.
    """
    step = grid.diff()
    before, after = step[:-1], step[1:]

    def second(values: Tensor, axis: int) -> Tensor:
        shape = [1] * values.dim()
        shape[axis] = -1
        left, right = before.view(shape), after.view(shape)
        slopes = values.diff(dim=axis) / step.view(shape)
        return 2.0 * slopes.diff(dim=axis) / (left + right)

    def central(values: Tensor, axis: int) -> Tensor:
        shape = [1] * values.dim()
        shape[axis] = -1
        size = values.shape[axis]
        return (values.narrow(axis, 2, size - 2) - values.narrow(axis, 0, size - 2)) / (
            (before + after).view(shape)
        )

    f_xx = second(func[:, 1:-1], 0)
    f_yy = second(func[1:-1], 1)
    f_xy = central(central(func, 0), 1)
    return (f_xx.square() + 2.0 * f_xy.square() + f_yy.square()).mean(dim=(0, 1)).sum()


class PreconditionedLMKAN2D(nn.Module):
    """γ·lmKAN(x) plus a linear branch, the forms that the paper trains (section 3.4).

    Args:
        num_grids: G.
        input_dim: N_in, even.
        output_dim: N_out.
        preconditioning: The linear branch; see `Preconditioning`.
        gamma: Factor of the lookup layer.
    """

    gamma: Tensor

    def __init__(
        self,
        num_grids: int,
        input_dim: int,
        output_dim: int,
        preconditioning: Preconditioning = "relu_first",
        gamma: float = 0.3,
    ) -> None:
        super().__init__()
        if preconditioning not in ("none", "linear", "relu_first", "relu_last"):
            raise ValueError(f"expected none, linear, relu_first or relu_last, found {preconditioning!r}")
        self.preconditioning = preconditioning
        self.lmkan = LMKAN2DLayer(num_grids, input_dim, output_dim)
        self.linear = None if preconditioning == "none" else nn.Linear(input_dim, output_dim)
        self.register_buffer("gamma", torch.tensor(1.0 if preconditioning == "none" else gamma))

    def forward(self, x: Tensor) -> Tensor:
        """[..., N_in] -> [..., N_out]."""
        y = self.gamma * self.lmkan(x)
        if self.linear is None:
            return y
        branch = self.linear(torch.relu(x) if self.preconditioning == "relu_first" else x)
        return y + (torch.relu(branch) if self.preconditioning == "relu_last" else branch)


class LMKANConv2d(nn.Module):
    """A convolution whose kernel is a lookup layer: [B, C_in, H, W] -> [B, C_out, H', W'].

    Each patch of C_in·k·k values, in `torch.nn.Unfold`'s order, goes through one layer; an odd number of
    values gets one zero feature at the end.

    Args:
        num_grids: G.
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: k, the same on both axes.
        stride: Step of the patches; the paper's networks use k.
        padding: Zeros around the image.
        dilation: Step inside a patch.
        preconditioning: See `Preconditioning`.
        gamma: Factor of the lookup layer.
    """

    def __init__(
        self,
        num_grids: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int | None = None,
        padding: int = 0,
        dilation: int = 1,
        preconditioning: Preconditioning = "none",
        gamma: float = 0.3,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.features = in_channels * kernel_size * kernel_size
        self.layer = PreconditionedLMKAN2D(
            num_grids, self.features + self.features % 2, out_channels, preconditioning, gamma
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H', W']."""
        patches = self._patches(x)
        if self.features % 2 == 1:
            patches = functional.pad(patches, (0, 1))
        return self.layer(patches).permute(0, 3, 1, 2)

    def _patches(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, H', W', C_in·k·k]."""
        k = self.kernel_size
        batch, channels, height, width = x.shape
        if (self.stride, self.padding, self.dilation) == (k, 0, 1):
            # Patches that do not overlap are a reshape, which runtimes handle better than Unfold.
            high, wide = height // k, width // k
            tiles = x[:, :, : high * k, : wide * k].reshape(batch, channels, high, k, wide, k)
            return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, high, wide, self.features)
        high, wide = (
            (size + 2 * self.padding - self.dilation * (k - 1) - 1) // self.stride + 1
            for size in (height, width)
        )
        columns = functional.unfold(x, k, self.dilation, self.padding, self.stride)
        return columns.transpose(1, 2).reshape(batch, high, wide, self.features)
