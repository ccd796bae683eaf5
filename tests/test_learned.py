"""Functions with learned factors: read off the chain of operations, against sums over a dense grid in double precision."""

import pytest
import torch
import torch.nn.functional as F

import rvconvert
from rvconvert.moments import composed
from rvconvert.moments.quadrature import quadrature
from rvconvert.rules import kinds, learned

A, B = torch.tensor([0.5, 1.3, 2.0, -0.7]), torch.tensor([0.3, 0.9, 1.5, 0.2])
FUNCTIONS = {
    "relu(x) - a relu(-x)": lambda x, a, b: F.relu(x) - a * F.relu(-x),
    "where(x > 0, x, a x)": lambda x, a, b: torch.where(x > 0, x, a * x),
    "where(x < 0, a x, 2 x)": lambda x, a, b: torch.where(x < 0, a * x, 2 * x),
    "maximum(a x, b x)": lambda x, a, b: torch.maximum(a * x, b * x),
    "min(x, a x)": lambda x, a, b: torch.min(x, a * x),
    "relu(a x) - b x": lambda x, a, b: torch.relu(a * x) - b * x,
    "x + sin(b x)^2 / a": lambda x, a, b: x + torch.sin(b * x) ** 2 / a,
    "x + 1 / (e^a + 1e-9) sin(x e^b)^2": lambda x, a, b: x + (a.exp() + 1e-9).reciprocal() * torch.sin(x * b.exp()).pow(2),
    "x + (1 - cos(2 b x)) / (2 b)": lambda x, a, b: x + (1 - torch.cos(2 * b * x)) / (2 * b),
    "a sin(b x + a) - 2 x + a": lambda x, a, b: a * torch.sin(b * x + a) - 2 * x + a,
    "x sigmoid(b x)": lambda x, a, b: x * torch.sigmoid(b * x),
    "x / (1 + e^-bx)": lambda x, a, b: x / (1 + torch.exp(-b * x)),
    "a x tanh(softplus(b x))": lambda x, a, b: a * (x * torch.tanh(F.softplus(b * x))),
    "0.5 x (1 + tanh(b x))": lambda x, a, b: 0.5 * x * (1 + torch.tanh(b * x)),
}
GATED = {
    "x ((x > 0) + a (x <= 0))": lambda x, a: x * ((x > 0) + a * (x <= 0)),
    "x + a (x > 0)": lambda x, a: x + a * (x > 0),
    "x (1 - (x > 0) a)": lambda x, a: x * (1 - (x > 0) * a),
    "2 (x > 0) + x": lambda x, a: (x > 0) * 2.0 + a * x,
    "x sigmoid(0 x)": lambda x, a: a * x * torch.sigmoid(0.0 * x),
}
OTHERS = {
    "a x + sigmoid(x)": lambda x, a, b: a * x + torch.sigmoid(x),
    "softplus(a x) - relu(b x)": lambda x, a, b: F.softplus(a * x) - torch.relu(b * x),
    "sin(a x) sin(b x)": lambda x, a, b: torch.sin(a * x) * torch.sin(b * x),
    "x sigmoid(x + a)": lambda x, a, b: x * torch.sigmoid(x + a),
}


def given(dtype, s):
    mean = torch.linspace(-4, 4, 21, dtype=dtype)[:, None].repeat(1, 4).requires_grad_()
    return mean, torch.full_like(mean, s * s).requires_grad_(), A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_()


def gradients(out, var, tensors):
    return torch.autograd.grad(out.sum() + var.sum(), tensors, allow_unused=True)


@pytest.mark.parametrize("s", [1e-3, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_moments_need_no_quadrature(name, s, monkeypatch):
    mean, var, a, b = given(torch.float32, s)

    def no_more_than_a_table(function, at, *rest):
        assert at.shape != mean.shape
        return quadrature(function, at, *rest)

    monkeypatch.setattr(composed, "quadrature", no_more_than_a_table)
    monkeypatch.setattr(composed, "_found", {})  # there are no more than so many tables in a process
    y = FUNCTIONS[name](rvconvert.RandomVariable(mean, var), a, b)
    found = gradients(y.mean, y.var, (mean, var, a, b))

    wide = given(torch.float64, s)
    z = torch.linspace(-9, 9, 20001, dtype=torch.float64)[:, None, None]
    weight = torch.softmax(-z * z / 2, 0)
    values = FUNCTIONS[name](wide[0] + wide[1].sqrt() * z, *wide[2:])
    out = (weight * values).sum(0)
    out_var = (weight * (values - out).square()).sum(0)
    torch.testing.assert_close(y.mean.double(), out, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(y.var.double(), out_var, rtol=2e-4, atol=2e-6 * s * s)
    assert (y.var >= 0).all()
    for mine, truth in zip(found, gradients(out, out_var, wide), strict=True):
        if truth is not None:
            torch.testing.assert_close(mine.double(), truth, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_are_integrated(name, monkeypatch):
    mean, var, a, b = given(torch.float32, 1.0)
    found = []
    for read in (learned.learned_moments, lambda *args: None):
        monkeypatch.setattr(kinds, "learned_moments", read)
        y = OTHERS[name](rvconvert.RandomVariable(mean, var), a, b)
        found.append((y.mean, y.var))
    torch.testing.assert_close(*found)


def test_a_learned_rate_of_0_has_its_value_and_gradient():
    mean, var, a, _ = given(torch.float32, 1.0)
    zero = torch.zeros(4, requires_grad=True)
    y = FUNCTIONS["x sigmoid(b x)"](rvconvert.RandomVariable(mean, var), a, zero)
    torch.testing.assert_close((y.mean, y.var), (mean / 2, var / 4))
    # d/db E[x sigmoid(b x)] at 0 is E[x²]/4
    torch.testing.assert_close(
        torch.autograd.grad(y.mean.sum(), zero)[0], ((mean**2 + var) / 4).sum(0).detach(), rtol=1e-5, atol=0
    )


def test_slopes_of_0_give_0():
    mean, var, _, _ = given(torch.float32, 1.0)
    zero = torch.zeros(4, requires_grad=True)
    y = torch.maximum(zero * rvconvert.RandomVariable(mean, var), zero * rvconvert.RandomVariable(mean, var) * 2)
    assert (y.mean == 0).all() and (y.var == 0).all()
    assert all(each.isfinite().all() for each in torch.autograd.grad(y.mean.sum() + y.var.sum(), (mean, var, zero)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GATED)
def test_what_a_comparison_gates_is_integrated(name, dtype):
    mean, var, a, _ = given(dtype, 1.0)
    y = GATED[name](rvconvert.RandomVariable(mean, var), a)
    z = torch.linspace(-9, 9, 20001, dtype=torch.float64)[:, None, None]
    weight, values = torch.softmax(-z * z / 2, 0), GATED[name](mean.detach().double() + z, a.detach().double())
    out = (weight * values).sum(0)
    torch.testing.assert_close(y.mean.double(), out, rtol=0, atol=2e-3)
    torch.testing.assert_close(y.var.double(), (weight * (values - out).square()).sum(0), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("rate", [1e-3, 1e-4, 1e-7])
def test_a_snake_of_a_small_rate_keeps_its_digits(rate):
    """x + sin²(a x)/a is x + a x² in the limit, of slope E[x²] in a."""
    a = torch.full((3,), rate, requires_grad=True)
    mean, var = torch.tensor([0.7, 1.0, -2.0]), torch.tensor([1.0, 0.3, 0.1])
    for snake in (lambda x: x + torch.sin(a * x) ** 2 / a, lambda x: x + (1 - torch.cos(2 * a * x)) / (2 * a)):
        y = snake(rvconvert.RandomVariable(mean, var))
        torch.testing.assert_close(y.mean, mean + rate * (mean**2 + var), rtol=0, atol=1e-4 * rate + 2e-7)
        torch.testing.assert_close(torch.autograd.grad(y.mean.sum(), a)[0], mean**2 + var, rtol=5e-3, atol=0)


def test_equal_lines_share_the_gradient_of_their_maximum():
    a, b = (torch.ones(3, requires_grad=True) for _ in "ab")
    x = rvconvert.RandomVariable(torch.tensor([-1.0, 0.5, 2.0]), torch.ones(3))
    found = torch.autograd.grad(torch.maximum(a * x, b * x).mean.sum(), (a, b))
    torch.testing.assert_close(found, (x.mean / 2, x.mean / 2))
