"""Linear maps with learned weights, and products of two operands (paper eqs 1 to 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rvconvert.registry import Exactness
from rvconvert.rules.kinds import Bilinear, Composite, add_rule

_INDEPENDENT = "inputs are independent"

add_rule("linear", Bilinear(), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, modules=(nn.Linear,))
for _dims, _conv, _transposed in (
    (1, nn.Conv1d, nn.ConvTranspose1d),
    (2, nn.Conv2d, nn.ConvTranspose2d),
    (3, nn.Conv3d, nn.ConvTranspose3d),
):
    add_rule(f"conv{_dims}d", Bilinear(), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, modules=(_conv,))
    add_rule(
        f"conv_transpose{_dims}d", Bilinear(), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, modules=(_transposed,)
    )
for _name in ("matmul", "mm", "bmm", "mv", "dot", "inner", "outer", "vdot"):
    add_rule(_name, Bilinear(("input", "other")), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)


def _rmatmul(x: Any, other: Any) -> Any:
    return torch.matmul(other, x)


add_rule("rmatmul", Composite(_rmatmul), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return beta * input + alpha * torch.matmul(mat1, mat2)


for _name in ("addmm", "baddbmm", "addmv"):
    add_rule(_name, Composite(_addmm), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)


def _bilinear(input1: Any, input2: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    # out_o = sum_i input1_i (sum_j W_oij input2_j): a linear map of input2, then a product with input1.
    inner = torch.matmul(weight.flatten(0, 1), input2.unsqueeze(-1)).squeeze(-1)
    inner = inner.unflatten(-1, weight.shape[:2])
    out = torch.matmul(inner, input1.unsqueeze(-1)).squeeze(-1)
    return out if bias is None else out + bias


add_rule(
    "bilinear",
    Composite(_bilinear),
    Exactness.EXACT_IF_INDEPENDENT,
    "inputs are independent; with input2 random, the inner products are taken as independent too",
    modules=(nn.Bilinear,),
)
