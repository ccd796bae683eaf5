"""The declared fallback: exact where the function is linear, first order elsewhere, and a refusal where it reads values."""

import pytest
import torch
import torch.nn.functional as F

import rvconvert
from rvconvert import REGISTRY, RandomVariable
from rvconvert.core.random_variable import Settings
from rvconvert.errors import ConversionError, UnsupportedOperationError
from rvconvert.rules.linearize import LINEARIZED, probes


def variable(*shape, seed=0, var=1e-4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, dtype=dtype, generator=generator)
    return RandomVariable(mean, var * (0.5 + torch.rand(shape, dtype=dtype, generator=generator)))


def exact_first_order(function, *inputs):
    """sum over all elements of (df/dx_j)^2 v_j, by the whole Jacobian."""
    jacobians = torch.func.jacfwd(function, argnums=tuple(range(len(inputs))))(*(x.mean for x in inputs))
    out = function(*(x.mean for x in inputs))
    return sum((j.square() * x.var).flatten(out.ndim).sum(-1) for j, x in zip(jacobians, inputs, strict=True))


FUNCTIONS = {
    "solve": (lambda a, b: torch.linalg.solve(a + 4 * torch.eye(3, dtype=a.dtype), b), (2, 3, 3), (2, 3, 1)),
    "inv": (lambda a: torch.linalg.inv(a + 4 * torch.eye(3, dtype=a.dtype)), (4, 3, 3)),
    "renorm": (lambda x: torch.renorm(x, 2, 0, 1.0), (3, 4)),
    "irfft": (lambda x: torch.fft.irfft(x, 6), (5, 4)),
    "affine_grid": (lambda theta: F.affine_grid(theta, [2, 1, 4, 3], align_corners=False), (2, 2, 3)),
    "grid": (lambda x, grid: torch.diff(x, dim=1) * grid.mean(), (3, 5), (2,)),
    "trapezoid": (lambda x: torch.trapezoid(x, dim=1), (3, 6)),
    "cov": (lambda x: torch.cov(x), (3, 5)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_the_whole_jacobian(name):
    function, *shapes = FUNCTIONS[name]
    inputs = [variable(*shape, seed=i) for i, shape in enumerate(shapes)]
    linearized = LINEARIZED.kind(function, tuple(inputs), {})
    torch.testing.assert_close(linearized.mean, function(*(x.mean for x in inputs)))
    torch.testing.assert_close(linearized.var, exact_first_order(function, *inputs), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["cholesky_ex", "inv_ex", "lu_factor"])
def test_whole_numbers_beside_a_result_are_those_of_the_means(name):
    function, x = getattr(torch.linalg, name), variable(2, 3, 3)
    x = RandomVariable(x.mean @ x.mean.mT + torch.eye(3, dtype=torch.float64), x.var)
    result, numbers = function(x)
    torch.testing.assert_close(result.mean, function(x.mean)[0])
    torch.testing.assert_close(result.var, exact_first_order(lambda a: function(a)[0], x), rtol=1e-6, atol=1e-12)
    assert torch.equal(numbers, function(x.mean)[1])


def test_samples_of_a_large_batch_do_not_mix():
    x = variable(50, 4, 4)
    function = torch.linalg.matrix_exp
    assert REGISTRY.find(function) is None
    y = function(x)
    expected = torch.stack([exact_first_order(function, RandomVariable(m, v)) for m, v in zip(x.mean, x.var, strict=True)])
    torch.testing.assert_close(y.var, expected, rtol=1e-6, atol=1e-12)


def test_more_elements_than_probes_are_estimated():
    x = variable(3, 40, 10, var=1.0)
    function = lambda x: torch.diff(x, dim=1).sum((1, 2))  # noqa: E731
    y = LINEARIZED.kind(function, (x,), {})
    expected = exact_first_order(function, x)
    error = (y.var / expected - 1).abs()
    assert error.max() < 4 * (2 / 64) ** 0.5
    assert torch.equal(y.var, LINEARIZED.kind(function, (x,), {}).var)


def test_probes_of_one_sample_are_orthogonal():
    (signs,) = probes([torch.Size((5, 33))], torch.zeros(1))
    assert signs.shape == (64, 5, 33)
    gram = torch.einsum("kf,kg->fg", signs[:, 2], signs[:, 2])
    assert torch.equal(gram, 64 * torch.eye(33))


def test_gradients_reach_both_moments():
    x = variable(3, 4)
    mean, var = x.mean.requires_grad_(), x.var.requires_grad_()
    y = torch.linalg.matrix_exp(RandomVariable(mean, var)[:, :3].unsqueeze(0))
    for gradient in torch.autograd.grad(y.mean.sum() + y.var.sum(), (mean, var)):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_several_results_and_in_place_twins():
    a = variable(2, 3, 3)
    q, r = torch.linalg.qr(a)
    assert isinstance(q, RandomVariable) and isinstance(r, RandomVariable)
    assert q.shape == r.shape == (2, 3, 3)
    x = variable(2, 3)
    assert x.renorm_(2, 0, 0.5) is x and (x.var > 0).all()


def test_it_says_that_it_is_approximate():
    rule = REGISTRY.fallback(torch.linalg.solve)
    assert rule is not None and rule.name == "linearized" and rule.exactness.value == "approximate"


@pytest.mark.parametrize("read", [lambda x: x.item(), lambda x: x.tolist(), lambda x: x.numpy(), bool, torch.nonzero])
def test_reading_a_value_is_refused(read):
    with pytest.raises(ConversionError):
        read(variable(1))


@pytest.mark.parametrize(
    "function",
    [torch.Tensor.item, torch.Tensor.tolist, torch.rand_like, torch.bernoulli, torch.multinomial, torch.Tensor.uniform_,
     torch.any, torch.Tensor.long, torch.bucketize, torch.fft.rfft],
)  # fmt: skip
def test_no_fallback_for_reads_draws_and_values_that_are_not_real(function):
    assert REGISTRY.fallback(function) is None


def test_a_function_without_real_result_is_refused_when_it_runs():
    with pytest.raises(UnsupportedOperationError):
        torch.signbit(variable(3))


def test_strict_switches_it_off():
    x = variable(2, 3, 3)
    strict = RandomVariable._make(x.mean, x.var, Settings(strict=True))
    with pytest.raises(UnsupportedOperationError, match="matrix_exp"):
        torch.linalg.matrix_exp(strict)


def test_a_rule_of_ones_own_comes_first():
    rules = REGISTRY.overlay()

    @rvconvert.rule(torch.linalg.matrix_exp, registry=rules)
    def mine(x):
        return x * 2.0

    x = variable(2, 3, 3)
    y = torch.linalg.matrix_exp(RandomVariable._make(x.mean, x.var, Settings(registry=rules)))
    torch.testing.assert_close(y.mean, 2 * x.mean)
