"""Linear maps with learned weights, and products of two operands (paper eqs 1 to 3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.registry import Exactness
from rvconvert.rules.calls import moments
from rvconvert.rules.kinds import Bilinear, Composite, FixedLinear, MatrixProduct, add_rule, of_itself, same_map
from rvconvert.rules.relations import is_same

if TYPE_CHECKING:
    from collections.abc import Callable

_INDEPENDENT = "inputs are independent"


@dataclass(frozen=True)
class Convolution(Bilinear):
    """A convolution; of images on a CPU with the channels last in memory, where torch's take as little as half the time.

    What follows keeps that order, so that it is changed once; a variable that leaves the model is put back.
    """

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        def channels_last(input: torch.Tensor, *rest: Any, **options: Any) -> Any:
            if input.is_cpu and input.ndim == 4 and torch.backends.mkldnn.is_available():
                input = input.contiguous(memory_format=torch.channels_last)
            return func(input, *rest, **options)

        return super().__call__(func if torch.compiler.is_compiling() else channels_last, args, kwargs)


add_rule("linear", Bilinear(), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, modules=(nn.Linear,))
for _dims, _conv, _transposed in (
    (1, nn.Conv1d, nn.ConvTranspose1d),
    (2, nn.Conv2d, nn.ConvTranspose2d),
    (3, nn.Conv3d, nn.ConvTranspose3d),
):
    add_rule(f"conv{_dims}d", Convolution(), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, modules=(_conv,))
    add_rule(f"conv_transpose{_dims}d", Convolution(), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, modules=(_transposed,))
for _name, _operands in (("kron", ("input", "other")), ("mv", ("input", "vec"))):
    add_rule(_name, Bilinear(_operands), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)
for _name, _other in (("matmul", "other"), ("mm", "mat2"), ("bmm", "mat2"), ("dot", "tensor"), ("vdot", "other")):
    add_rule(_name, MatrixProduct(("input", _other)), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)
add_rule(
    "sparse.mm",
    MatrixProduct(("mat1", "mat2")),
    Exactness.EXACT_IF_INDEPENDENT,
    _INDEPENDENT,
    functions=(torch.sparse.mm,),
)


def _rmatmul(x: Any, other: Any) -> Any:
    return torch.matmul(other, x)


def _plus(product: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """beta input + alpha product(a, b)."""

    def body(input: Any, *operands: Any, beta: float = 1, alpha: float = 1, **named: Any) -> Any:
        out = product(*operands, *named.values())
        out = out if alpha == 1 else alpha * out
        if beta == 0:  # torch reads no input then, which may be uninitialised memory
            return out
        return out + (input if beta == 1 else beta * input)

    return body


for _name, _body in (
    ("rmatmul", _rmatmul),
    ("addmm", _plus(torch.matmul)),
    ("baddbmm", _plus(torch.bmm)),
    ("addbmm", _plus(lambda a, b: torch.sum(torch.bmm(a, b), 0))),
    ("addmv", _plus(torch.mv)),
    ("addr", _plus(torch.outer)),
):
    add_rule(_name, Composite(_body), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)


def _chain(*matrices: Any) -> Any:
    return reduce(torch.matmul, matrices[0] if isinstance(matrices[0], (list, tuple)) else matrices)


_CHAIN = "inputs are independent; elements of a product of two random matrices are taken as independent too"
add_rule("chain_matmul", Composite(_chain), Exactness.APPROXIMATE, _CHAIN)
add_rule("multi_dot", Composite(_chain), Exactness.APPROXIMATE, _CHAIN)


def _bilinear(input1: Any, input2: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """y = x1' W x2: var = (W^2)(v1, v2) + sum_i v1_i (W m2)_i^2 + sum_j v2_j (m1' W)_j^2, for each output."""
    (a, a_var), (b, b_var) = moments(input1), moments(input2)
    mean = F.bilinear(a, b, weight, bias)
    var: Any = 0
    if a_var is not None:
        rows = torch.einsum("oij,...j->...oi", weight, b)
        var = var + torch.einsum("...oi,...i->...o", rows.square(), a_var)
    if b_var is not None:
        columns = torch.einsum("oij,...i->...oj", weight, a)
        var = var + torch.einsum("...oj,...j->...o", columns.square(), b_var)
    if a_var is not None and b_var is not None:
        var = var + F.bilinear(a_var, b_var, weight.square())
    like = input1 if isinstance(input1, RandomVariable) else input2
    return like.with_moments(mean, var)


add_rule("bilinear", Composite(_bilinear), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, modules=(nn.Bilinear,))


def _linalg_cross(input: Any, other: Any, *, dim: int = -1) -> Any:
    a1, a2, b1, b2 = (torch.roll(x, -k, dim) for x in (input, other) for k in (1, 2))
    return a1 * b2 - a2 * b1


def _cross(input: Any, other: Any, dim: int | None = None) -> Any:
    return _linalg_cross(input, other, dim=list(input.shape).index(3) if dim is None else dim)


add_rule(
    "linalg_cross",
    Composite(_linalg_cross),
    Exactness.EXACT_IF_INDEPENDENT,
    _INDEPENDENT,
    functions=(torch.linalg.cross,),
)
add_rule("cross", Composite(_cross), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)


# ---- einsum --------------------------------------------------------------------------------------------------------

_ONE = FixedLinear(same_map)
_TWO = Bilinear(("input", "other"))


def _contract(terms: list[str], output: str, operands: list[Any]) -> Any:
    """``einsum`` of one or two operands, of which any may be random."""
    equation = ",".join(terms) + "->" + output
    if not any(isinstance(x, RandomVariable) for x in operands):
        return torch.einsum(equation, *operands)
    if len(operands) == 1:
        return _ONE(lambda tensor: torch.einsum(equation, tensor), tuple(operands), {})
    (first, second), (a, b) = terms, operands
    if first == second and isinstance(a, RandomVariable) and is_same(b, a):
        return _contract([first], output, [a.square()])
    made = _TWO(lambda *tensors: torch.einsum(equation, *tensors), tuple(operands), {})
    apart = [(x, y) for x, y in zip(first, second, strict=False) if x != y]
    # Rows of one variable with all of its rows, as in "ik,jk->ij"
    if isinstance(a, RandomVariable) and is_same(b, a) and len(first) == len(second) and len(apart) == 1:
        ((x, y),) = apart
        if output.endswith((x + y, y + x)) and output.count(x) == output.count(y) == 1:
            return of_itself(made, torch.einsum(f"{first}->{output[:-2]}{x}", a.var))
    return made


def _letters(term: str, wanted: str) -> str:
    """The letters of ``term`` that ``wanted`` has too, each once; the ellipsis stays."""
    return ("..." if "..." in term else "") + "".join(x for x in dict.fromkeys(term.replace("...", "")) if x in wanted)


def _einsum(equation: Any, *operands: Any) -> Any:
    """Sums of products, one operand after the other; indices that only one operand has are summed first.

    So two terms of a sum never share an element, and the law of independent products holds.
    """
    values = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    if not isinstance(equation, str):
        raise NotImplementedError("einsum of random variables takes its equation as a string")
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        once = sorted(x for x in set(left) - set(",.") if left.count(x) == 1)
        output = ("..." if "..." in left else "") + "".join(once)
    for i, term in enumerate(terms):
        shared = output + "".join(terms[:i] + terms[i + 1 :])
        kept = _letters(term, shared)
        if kept != term:
            terms[i], values[i] = kept, _contract([term], kept, [values[i]])
    while len(terms) > 1:
        rest = output + "".join(terms[2:])
        kept = _letters(terms[0] + terms[1], rest) if len(terms) > 2 else output
        value = _contract(terms[:2], kept, values[:2])
        terms, values = [kept, *terms[2:]], [value, *values[2:]]
    return values[0] if terms[0] == output else _contract(terms, output, values)


def _tensordot(a: Any, b: Any, dims: Any = 2, out: None = None) -> Any:
    if isinstance(dims, int):
        dims = range(a.ndim - dims, a.ndim), range(dims)
    first, second = ([int(d) % x.ndim for d in each] for x, each in zip((a, b), dims, strict=True))
    of_a = ascii_lowercase[: a.ndim]
    met = {d: of_a[c] for c, d in zip(first, second, strict=True)}
    of_b = [met.get(d, ascii_uppercase[d]) for d in range(b.ndim)]
    kept = [x for d, x in enumerate(of_a) if d not in first] + [x for d, x in enumerate(of_b) if d not in met]
    return _einsum(f"{of_a},{''.join(of_b)}->{''.join(kept)}", a, b)


def _inner(input: Any, other: Any) -> Any:
    return input * other if input.ndim == 0 or other.ndim == 0 else _tensordot(input, other, ([-1], [-1]))


def _vecdot(x: Any, y: Any, dim: int = -1) -> Any:
    return (x * y).sum(dim)


def _outer(input: Any, vec2: Any) -> Any:
    return _einsum("i,j->ij", input, vec2)


for _name, _product in (
    ("tensordot", _tensordot),
    ("inner", _inner),
    ("outer", _outer),
    ("ger", _outer),
    ("vecdot", _vecdot),
):
    add_rule(_name, Composite(_product), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)
add_rule(
    "einsum",
    Composite(_einsum),
    Exactness.EXACT_IF_INDEPENDENT,
    "operands are independent; of three or more random ones, intermediate products are taken as independent",
    functions=(torch.einsum,),
)
