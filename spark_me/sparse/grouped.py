"""Matrix products of rows whose channels fall into groups, each with a matrix of its own.

A convolution's weight at one kernel offset is such a matrix [Cout, Cin/groups]: a group's outputs lie side by side.
"""

import torch
from torch import Tensor
from torch.nn import functional


def multiply(rows: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """Rows [n, Cin] by the transposes of the groups' matrices [Cout, Cin/groups] → [n, Cout]."""
    if groups == 1:
        return functional.linear(rows, matrix)
    if _one_each(matrix, groups):
        return rows * matrix.flatten()
    return _joined(torch.bmm(_by_group(rows, groups), _split(matrix, groups).mT))


def multiply_transposed(rows: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """Rows [n, Cout] by the groups' matrices [Cout, Cin/groups] → [n, Cin]."""
    if groups == 1:
        return rows @ matrix
    if _one_each(matrix, groups):
        return rows * matrix.flatten()
    return _joined(torch.bmm(_by_group(rows, groups), _split(matrix, groups)))


def multiply_rows(x: Tensor, y: Tensor, groups: int, out: Tensor) -> None:
    """Transpose of x [n, Cout] by y [n, Cin] in every group, written to `out` [Cout, Cin/groups]."""
    if groups == 1:
        torch.mm(x.t(), y, out=out)
    elif _one_each(out, groups):
        out.copy_((x * y).sum(dim=0)[:, None])
    else:
        out.copy_(torch.bmm(_by_group(x, groups).mT, _by_group(y, groups)).flatten(0, 1))


def _one_each(matrix: Tensor, groups: int) -> bool:
    """Whether every channel is a group of its own."""
    return matrix.shape == (groups, 1)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[n, C] → [groups, n, C/groups]."""
    return x.view(x.shape[0], groups, -1).transpose(0, 1)


def _split(matrix: Tensor, groups: int) -> Tensor:
    """[Cout, Cin/groups] → [groups, Cout/groups, Cin/groups]."""
    return matrix.unflatten(0, (groups, -1))


def _joined(x: Tensor) -> Tensor:
    """[groups, n, C/groups] → [n, C]."""
    return x.transpose(0, 1).flatten(1)
