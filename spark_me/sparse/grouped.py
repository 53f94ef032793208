"""Matrix products of rows whose channels fall into groups, each with a matrix of its own."""

import torch
from torch import Tensor


def multiply(rows: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """Rows [n, Cin] by the groups' matrices side by side [Cin/groups, Cout] → [n, Cout]."""
    if groups == 1:
        return rows @ matrix
    return _joined(torch.bmm(_by_group(rows, groups), _by_group(matrix, groups)))


def multiply_transposed(rows: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """Rows [n, Cout] by the transposes of the groups' matrices [Cin/groups, Cout] → [n, Cin]."""
    if groups == 1:
        return rows @ matrix.t()
    return _joined(torch.bmm(_by_group(rows, groups), _by_group(matrix, groups).mT))


def multiply_rows(x: Tensor, y: Tensor, groups: int, out: Tensor) -> None:
    """Transpose of x [n, Cin] by y [n, Cout] in every group, written to `out` [Cin/groups, Cout]."""
    if groups == 1:
        torch.mm(x.t(), y, out=out)
    else:
        out.copy_(_joined(torch.bmm(_by_group(x, groups).mT, _by_group(y, groups))))


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[n, C] → [groups, n, C/groups]."""
    return x.view(x.shape[0], groups, -1).transpose(0, 1)


def _joined(x: Tensor) -> Tensor:
    """[groups, n, C/groups] → [n, C]."""
    return x.transpose(0, 1).flatten(1)
