"""Moments of elementwise functions against float64 integration; benchmarks/accuracy.py is the reference."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special
from torch.utils._python_dispatch import TorchDispatchMode

import rvconvert
from rvconvert import moments as gaussian
from rvconvert.moments import composed
from rvconvert.moments.quadrature import quadrature
from rvconvert.moments.recognized import recognized
from rvconvert.moments.table import Grid, integrals

_path = Path(__file__).parents[1] / "benchmarks" / "accuracy.py"
_spec = importlib.util.spec_from_file_location("accuracy", _path)
accuracy = sys.modules["accuracy"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(accuracy)

BY_NAME = {case.name: case for case in accuracy.CASES}
# A rate of 3 on deviations up to 3 is a deviation of 9: outside the range that the nodes are chosen for.
WITHIN_RANGE = [case for case in accuracy.CASES if case.name != "softplus (beta 3)"]
DIFFERENTIABLE = [case for case in WITHIN_RANGE if case.name not in ("hardshrink", "threshold")]
GRID = accuracy.grid(means=25, deviations=10)

named = pytest.mark.parametrize


@named("dtype", [torch.float32, torch.float64], ids=str)
@named("case", WITHIN_RANGE, ids=lambda case: case.name)
def test_accuracy(case, dtype):
    mean_error, var_error, where, negative = accuracy.errors(case, dtype, GRID)
    assert mean_error <= 1e-5, where
    assert var_error <= 1e-4, where
    assert not negative


@named("deviation", [100.0, 1e3, 1e4, 1e6])
@named(
    ("name", "height", "missing"),
    # Half of the difference of the two ends, and the integral of 1 - ((f - middle)/height)².
    [("tanh", 1.0, 2.0), ("sigmoid", 0.5, 4.0), ("hardtanh", 1.0, 4 / 3), ("hardsigmoid", 0.5, 4.0), ("relu6", 3.0, 4.0)],
)
def test_a_bounded_function_of_a_wide_variable_has_the_variance_of_a_coin(name, height, missing, deviation):
    mean, var = torch.tensor([3.0 if name == "relu6" else 0.0]), torch.tensor([deviation**2])
    _, out_var = getattr(gaussian, name)(mean, var)
    expected = height**2 * (1 - missing / (deviation * np.sqrt(2 * np.pi)))
    assert abs(out_var.item() / expected - 1) < 1e-4


@named("name, kink", [("elu", 0.0), ("selu", 0.0), ("hardswish", -3.0), ("hardswish", 3.0), ("hardtanh", 1.0), ("relu6", 0.0)])
def test_accuracy_of_a_function_that_bends_within_and_beyond_its_table(name, kink):
    p = torch.tensor([-100.0, -20, -9, -8.01, -7.99, -7, -4, 0, 4, 7, 7.99, 8.01, 9, 20, 100], dtype=torch.float64)
    p, s = (x.ravel() for x in torch.meshgrid(p, torch.logspace(-5, 1, 61, dtype=torch.float64), indexing="ij"))
    mean, var = (kink + p * s).float(), s.square().float()
    function = getattr(gaussian, name)
    out, out_var = function(mean, var)
    expected, expected_var = function(mean.double(), var.double())
    seen = expected_var > 1e-6 * var
    assert seen.sum() > 400
    assert ((out - expected).abs() / (expected.square() + expected_var).sqrt())[seen].max() < 1e-5
    assert ((out_var - expected_var).abs() / expected_var)[seen].max() < 1e-4


def test_softplus_with_a_steep_beta():
    mean_error, var_error, *_ = accuracy.errors(BY_NAME["softplus (beta 3)"], torch.float32, GRID)
    assert mean_error <= 1e-5
    assert var_error <= 1e-3


@named("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_gradients_against_differences_of_the_reference(case):
    m, v = (a.ravel() for a in np.meshgrid(np.array([-4.3, -1.1, -0.2, 0.37, 2.6]), np.array([1e-3, 0.3, 4.0])))
    mean, var = (torch.tensor(a, requires_grad=True) for a in (m, v))
    out, out_var = case.moments(mean, var, *case.arguments)
    got = [
        *torch.autograd.grad(out.sum(), (mean, var), retain_graph=True),
        *torch.autograd.grad(out_var.sum(), (mean, var)),
    ]

    def slope(index, step_m, step_v):
        def at(k):
            return accuracy.reference(case, m + k * step_m, v + k * step_v, panels=12)[index]

        return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / 12

    hm, hv = 1e-2 * np.sqrt(v), 1e-2 * v
    expected = [slope(0, hm, 0) / hm, slope(0, 0, hv) / hv, slope(1, hm, 0) / hm, slope(1, 0, hv) / hv]
    # The natural size of each: dVar/dm can vanish by symmetry, so it is measured against dVar/dv and s.
    size = [np.abs(e) for e in expected]
    floor = [1e-2 * size[0], 1e-2 * size[0] / np.sqrt(v), 1e-2 * size[3] * np.sqrt(v), 1e-2 * size[3]]
    for name, g, e, a, b in zip(("dE/dm", "dE/dv", "dVar/dm", "dVar/dv"), got, expected, size, floor, strict=True):
        error = np.abs(g.numpy() - e) / np.maximum(np.maximum(a, b), 1e-6)
        assert error.max() <= 3e-3, (name, error.max(), m[error.argmax()], v[error.argmax()])


@named("name", ["hardshrink", "threshold"])
def test_gradients_of_a_function_that_jumps(name):
    case = BY_NAME[name]
    mean = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    var = torch.linspace(0.01, 2, 41, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: case.moments(m, v, *case.arguments), (mean, var))


TORCH = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "prelu": lambda x: F.leaky_relu(x, 0.25),
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "threshold": lambda x: F.threshold(x, 0.1, -0.3),
    "elu": F.elu,
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.5),
    "gelu": F.gelu,
    "gelu (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softplus (beta 3)": lambda x: F.softplus(x, 3.0),
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "softsign": F.softsign,
    "abs": torch.abs,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "square": torch.square,
    "cube": lambda x: x**3,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
}


@named("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@named("case", accuracy.CASES, ids=lambda case: case.name)
def test_zero_variance(case, dtype):
    mean = torch.tensor([-30.0, -6, -3, -1, -0.5, 0, 1e-3, 0.5, 1, 3, 6, 30], dtype=dtype, requires_grad=True)
    var = torch.zeros_like(mean, requires_grad=True)
    out, out_var = case.moments(mean, var, *case.arguments)
    assert out.dtype == out_var.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, TORCH[case.name](mean), rtol=4 * eps, atol=8 * eps)
    assert (out_var == 0).all()
    for result in (out, out_var):
        for grad in torch.autograd.grad(result.sum(), (mean, var), retain_graph=True, allow_unused=True):
            assert grad is None or grad.isfinite().all()


@named("case", accuracy.CASES, ids=lambda case: case.name)
def test_far_inputs_stay_finite(case):
    if case.name in ("exp", "expm1"):
        pytest.skip("overflows by its nature")
    mean = torch.tensor([-1e3, -50, 0, 50, 1e3]).repeat_interleave(5).requires_grad_()
    var = torch.tensor([0.0, 1e-30, 1e-3, 1e2, 1e6]).repeat(5).requires_grad_()
    out, out_var = case.moments(mean, var, *case.arguments)
    assert out.isfinite().all()
    assert out_var.isfinite().all() and (out_var >= 0).all()
    grads = torch.autograd.grad((out + out_var).sum(), (mean, var))
    assert all(g.isfinite().all() for g in grads)


@named("where", ["mean", "var"])
@named("case", accuracy.CASES, ids=lambda case: case.name)
def test_nan_stays_nan_where_it_is(case, where):
    """As in the plain network: a scaler of mixed precision skips such a step, and nothing else is to stop."""
    mean, var = torch.tensor([0.3, -0.4, 0.5]), torch.tensor([0.2, 0.3, 0.4])
    (mean if where == "mean" else var)[1] = torch.nan
    mean.requires_grad_()
    out, out_var = case.moments(mean, var, *case.arguments)
    (by_mean,) = torch.autograd.grad(out.sum() + out_var.sum(), mean)
    for result in (out, out_var, by_mean):
        assert result.isnan().tolist() == [False, True, False]


def test_relu_in_single_precision_over_all_scales():
    v, a = np.meshgrid(np.geomspace(1e-12, 1e2, 29), np.linspace(-12, 12, 193))
    v = v.ravel().astype(np.float32)
    m = (a.ravel() * np.sqrt(v)).astype(np.float32)
    out, out_var = (t.double().numpy() for t in gaussian.relu(torch.tensor(m), torch.tensor(v)))
    m, v = m.astype(np.float64), v.astype(np.float64)
    s = np.sqrt(v)
    t = np.abs(m) / s
    # The tail moments E[U], E[U²], U = max(Z - t, 0), integrate exp(-u²/2 - t u): nothing cancels.
    x, w = np.polynomial.legendre.leggauss(160)
    u = 5.0 * (x + 1)[:, None]
    kernel = 5.0 * w[:, None] * np.exp(-u * u / 2 - t * u) * np.exp(-t * t / 2) / np.sqrt(2 * np.pi)
    small, square = s * (kernel * u).sum(0), v * (kernel * u * u).sum(0)
    small_var = square - small**2
    large = np.abs(m) + small
    mean = np.where(m > 0, large, small)
    var = np.where(m > 0, v - small_var - 2 * large * small, small_var)
    normal = (mean > 1.2e-26) & (var > 1.2e-26)  # below, 0 is given, far enough from denormal numbers for the next layer
    assert normal.mean() > 0.7
    assert (np.abs(out - mean) / mean)[normal].max() <= 3e-5
    assert (np.abs(out_var - var) / var)[normal].max() <= 3e-5
    assert (out_var >= 0).all()
    assert (np.abs(out - mean) <= 3e-5 * mean + 1.2e-26).all()


@pytest.mark.parametrize("slope", [-3.0, -1.0, -0.3, 1e-4, 0.01, 0.2, 0.99, 1.0, 4.0])
def test_a_table_of_each_slope_holds_what_the_closed_form_gives(slope):
    v, a = torch.meshgrid(torch.logspace(-12, 4, 33), torch.linspace(-13, 13, 313), indexing="ij")
    mean, var = a * v.sqrt(), v.clone()
    inputs = [x.flatten().requires_grad_() for x in (mean, var)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, right = (gaussian.leaky_relu(*x, slope) for x in (inputs, exact))
    size = (exact[0].detach().square() + exact[1].detach()).sqrt()
    assert ((found[0] - right[0]).abs() / size).max() < 2e-6
    torch.testing.assert_close(found[1].double(), right[1], rtol=3e-5, atol=1e-25)
    weight = (torch.randn(size.shape), torch.randn(size.shape))
    for made in (found, right):
        (made[0] * weight[0].to(made[0])).add(made[1] / made[1].detach().sqrt() * weight[1].to(made[0])).sum().backward()
    torch.testing.assert_close(inputs[0].grad.double(), exact[0].grad, rtol=1e-3, atol=2e-3)


def test_relu_gradient_at_zero():
    mean = torch.zeros(3, requires_grad=True)
    var = torch.tensor([1.0, 1e-6, 0.0], requires_grad=True)
    out, out_var = gaussian.relu(mean, var)
    by_mean, by_var = torch.autograd.grad(out.sum(), (mean, var), retain_graph=True)
    torch.testing.assert_close(by_mean, torch.tensor([0.5, 0.5, 0.0]))  # torch's own subgradient where var = 0
    torch.testing.assert_close(by_var[:2], 0.3989422804 / (2 * var.detach()[:2].sqrt()))
    assert by_var[2] == 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(out_var.sum(), (mean, var)))


def test_gradients_in_single_precision_where_the_variance_cancels():
    mean = torch.linspace(-6, 6, 49)
    for case in (BY_NAME[name] for name in ("relu", "gelu", "tanh", "sigmoid", "silu", "elu", "hardswish")):
        for deviation in (1e-3, 1e-2, 1e-1):
            grads = []
            for dtype in (torch.float32, torch.float64):
                m = mean.to(dtype).requires_grad_()
                v = torch.full_like(m, deviation**2).requires_grad_()
                out, out_var = case.moments(m, v, *case.arguments)
                # dE/dm and dVar/dv: both are squares or averages of f', so they keep relative accuracy.
                grads.append(
                    torch.stack(
                        (
                            *torch.autograd.grad(out.sum(), (m,), retain_graph=True),
                            *torch.autograd.grad(out_var.sum(), (v,)),
                        )
                    )
                )
            single, double = grads[0].double(), grads[1]
            size = double.abs() + 1e-3 * double.abs().amax(1, keepdim=True)
            assert ((single - double).abs() / size).max() <= 2e-2, case.name


@named("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_gradients_in_single_precision_are_those_in_double_precision(case):
    mean, deviation = (x.ravel() for x in torch.meshgrid(torch.linspace(-6, 6, 61), torch.logspace(-2, 0.48, 25), indexing="ij"))
    grads = []
    for dtype in (torch.float32, torch.float64):
        m, v = mean.to(dtype).requires_grad_(), deviation.to(dtype).square().requires_grad_()
        moments = case.moments(m, v, *case.arguments)
        grads.append([g.double() for x in moments for g in torch.autograd.grad(x.sum(), (m, v), retain_graph=True)])
    for name, single, double in zip(("dE/dm", "dE/dv", "dVar/dm", "dVar/dv"), *grads, strict=True):
        assert (single - double).abs().max() <= 2e-3 * double.abs().max(), name


@named("name", ["relu", "leaky_relu", "relu6", "hardswish", "elu", "gelu", "silu", "tanh", "sigmoid", "softplus"])
def test_no_denormal_number_leaves_an_activation(name):
    mean, deviation = (x.ravel() for x in torch.meshgrid(torch.linspace(-30, 30, 601), torch.logspace(-7, 1, 81), indexing="ij"))
    mean.requires_grad_()
    var = deviation.square().requires_grad_()
    moments = BY_NAME[name].moments(mean, var, *BY_NAME[name].arguments)
    for x in (*moments, *torch.autograd.grad(moments, (mean, var), [torch.full_like(mean, 1e-6)] * 2)):
        assert not ((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).any()


@named("in_q", [0, 5])
def test_a_table_read_by_indices_for_a_compiler_gives_the_same(in_q):
    grid = Grid(end=4, in_p=12, in_q=in_q, spacing=1)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1, 3, in_q + 1, 13, generator=generator).contiguous(memory_format=torch.channels_last)
    x = torch.cat((torch.linspace(-1, 1, 13), torch.tensor([-torch.inf, -3, 3, torch.inf]), torch.rand(47, generator=generator)))
    x, y = x.view(1, 1, -1), torch.rand(1, 1, len(x), generator=generator) * 2 - 1
    y[..., :4] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    torch.testing.assert_close(grid._gathered(table, x, y), grid.read(table, x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@named("function", [torch.tanh, torch.sigmoid, torch.erf, F.hardtanh, F.relu6, F.hardsigmoid])
def test_gradients_of_a_bounded_function_of_a_wide_input(function, dtype):
    wide = dtype == torch.float64
    means, deviations = torch.tensor([-2.0, 0.5, 30.0], dtype=dtype), torch.logspace(-1, 3.5 if wide else 2, 25, dtype=dtype)
    mean, deviation = (x.ravel() for x in torch.meshgrid(means, deviations, indexing="ij"))
    m, v = mean.clone().requires_grad_(), deviation.square().requires_grad_()
    of_mean, of_var = torch.autograd.grad(getattr(gaussian, function.__name__)(m, v)[1].sum(), (m, v))

    def exact(m, v):
        _, gain, rest = integrals(function, m.double(), v.double(), (-6, -3, -1, 0, 1, 3, 6))
        return v.double() * (gain.square() + rest)

    step = 1e-3 * deviation.double()
    by_mean = (exact(mean + step, v) - exact(mean - step, v)) / (2 * step)
    by_var = (exact(mean, v * 1.001) - exact(mean, v * 0.999)) / (0.002 * v.double())
    varies = exact(mean, v) > 1e-6 * v.detach()
    assert float(((of_var - by_var).abs() / (by_var.abs() + by_mean.abs() / deviation))[varies].max()) < (2e-3 if wide else 0.02)
    assert float(((of_mean - by_mean).abs() / (by_mean.abs() + deviation * by_var.abs()))[varies].max()) < (
        2e-3 if wide else 0.02
    )


class _Denormal(TorchDispatchMode):
    """Which operations made denormal numbers."""

    def __init__(self):
        super().__init__()
        self.by = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.is_floating_point()
            and ((out != 0) & (out.abs() < torch.finfo(out.dtype).tiny)).sum() > out.numel() / 1000
        ):
            self.by.add(str(function))
        return out


@named("name", ["relu", "leaky_relu", "relu6", "hardswish", "elu", "gelu", "silu", "tanh", "sigmoid", "softplus"])
def test_no_denormal_number_is_made_within_an_activation(name):
    means, deviations = torch.linspace(-12, 12, 601), torch.logspace(-3.5, 1, 81)
    mean, deviation = (x.ravel() for x in torch.meshgrid(means, deviations, indexing="ij"))
    made = _Denormal()
    with torch.no_grad(), made:
        BY_NAME[name].moments(mean, deviation.square(), *BY_NAME[name].arguments)
    assert not made.by


def test_the_variance_of_a_sine_keeps_its_digits_in_double_precision():
    means, variances = (
        torch.linspace(-3, 3, 13, dtype=torch.float64),
        torch.tensor([0.005, 0.0099, 0.0101, 0.03, 0.049, 0.051, 0.3]),
    )
    m, v = (x.ravel() for x in torch.meshgrid(means, variances.double(), indexing="ij"))
    exact = (1 - torch.exp(-2 * v) * torch.cos(2 * m)) / 2 - torch.exp(-v) * torch.sin(m).square()
    torch.testing.assert_close(gaussian.sin(m, v)[1], exact, rtol=1e-9, atol=0)


def test_clamp_bounds_get_their_gradient():
    torch.manual_seed(0)
    mean = torch.randn(8, dtype=torch.float64, requires_grad=True)
    var = (torch.rand(8, dtype=torch.float64) + 0.2).requires_grad_()
    lo, hi = (torch.tensor(b, dtype=torch.float64, requires_grad=True) for b in (-0.7, 0.9))
    assert torch.autograd.gradcheck(lambda *a: gaussian.clamp(*a), (mean, var, lo, hi), rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(lambda *a: gaussian.clamp(a[0], a[1], a[2]), (mean, var, lo))
    assert torch.autograd.gradcheck(lambda *a: gaussian.clamp(a[0], a[1], None, a[2]), (mean, var, hi))
    wide = gaussian.clamp(mean, var, -40.0, 40.0)
    torch.testing.assert_close(wide, (mean, var), rtol=1e-6, atol=1e-6)


@named("function", [gaussian.relu, gaussian.absolute, gaussian.gelu, gaussian.erf, gaussian.exp, gaussian.sin])
def test_closed_forms_gradcheck(function):
    mean = torch.linspace(-3, 3, 7, dtype=torch.float64).add(0.013).requires_grad_()
    var = torch.linspace(0.05, 2, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (mean, var), rtol=1e-6, atol=1e-8)


def test_prelu_slope_per_channel():
    torch.manual_seed(0)
    mean = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    var = (torch.rand(4, 3, 5, dtype=torch.float64) + 0.1).requires_grad_()
    slope = torch.tensor([0.25, -0.5, 1.5], dtype=torch.float64).view(3, 1).requires_grad_()
    assert torch.autograd.gradcheck(gaussian.leaky_relu, (mean, var, slope))


# ---- quadrature of any function --------------------------------------------------------------------------


def test_generic_quadrature_of_smooth_functions():
    for dtype, small in ((torch.float64, 0.0), (torch.float32, 1e-2)):
        for name in ("silu", "sigmoid", "softplus", "sin"):
            case = BY_NAME[name]
            # sin² over deviations of 3 oscillates too fast for the nodes: its variance is 2e-3 off there.
            m, v = (a[GRID[1] <= (1.1 if name == "sin" else 9.1)] for a in GRID)
            expected, variance = accuracy.reference(case, m, v, panels=12)
            out, out_var = quadrature(TORCH[name], torch.tensor(m, dtype=dtype), torch.tensor(v, dtype=dtype))
            error = np.abs(out.double().numpy() - expected) / np.sqrt(expected**2 + variance)
            assert error.max() <= 2e-5, name
            # Values of f differ by rounding: the variance keeps what float32 leaves of f(x) - f(mean).
            noise = small * (1 + np.abs(expected)) * 1e-3
            assert (np.abs(out_var.double().numpy() - variance) <= 2e-4 * variance + noise * np.sqrt(variance)).all(), name


@named("name", ["elu", "selu", "softsign", "hardtanh", "hardswish", "hardshrink", "threshold"])
def test_generic_quadrature_splits_at_kinks(name):
    m, v = GRID
    case = BY_NAME[name]
    inside = v > 1e-4
    m, v = m[inside], v[inside]
    expected, variance = accuracy.reference(case, m, v, panels=12)
    out, out_var = quadrature(TORCH[name], torch.tensor(m), torch.tensor(v), kinks=case.kinks[::-1])
    scale = np.sqrt(expected**2 + variance + 1e-12)
    assert (np.abs(out.numpy() - expected) / scale).max() <= 5e-5
    assert (np.abs(out_var.numpy() - variance) / (variance + 1e-6)).max() <= 5e-3


@named("dtype", [torch.float32, torch.float64])
@named("function", [torch.tanh, torch.atan, torch.sigmoid, F.silu])
def test_generic_quadrature_of_a_law_much_wider_than_the_bend(function, dtype):
    away, deviation = (x.ravel() for x in torch.meshgrid(torch.linspace(-4, 4, 33), torch.logspace(-1, 2, 31), indexing="ij"))
    mean, var = (away * deviation).double(), deviation.double().square()
    expected, gain, rest = integrals(function, mean, var, (-40, -10, -3, -1, 0, 1, 3, 10, 40))
    out, out_var = quadrature(function, mean.to(dtype), var.to(dtype))
    variance = var * (gain.square() + rest)
    varies = variance > 1e-6 * var
    of_mean, of_var = (3e-4, 5e-3) if dtype == torch.float64 else (1e-3, 0.02)
    assert float(((out - expected).abs() / (expected.square() + variance).sqrt()).max()) < of_mean
    assert float(((out_var - variance).abs() / variance)[varies].max()) < of_var


def test_generic_quadrature_of_a_written_out_elu():
    m, v = (torch.tensor(a, dtype=torch.float32) for a in GRID)
    expected, variance = gaussian.elu(m, v, 0.7)
    out, out_var = quadrature(lambda x: torch.where(x > 0, x, 0.7 * (torch.exp(x) - 1)), m, v, kinks=(0.0,))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(out_var, variance, rtol=5e-2, atol=1e-5)


def test_generic_quadrature_differentiates_what_f_closes_over():
    torch.manual_seed(0)
    mean = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    var = (torch.rand(3, 4, dtype=torch.float64) + 0.1).requires_grad_()
    beta = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64, requires_grad=True)

    def swish(m, v, b):
        return quadrature(lambda x: x * torch.sigmoid(b * x), m, v)

    assert torch.autograd.gradcheck(swish, (mean, var, beta), rtol=1e-3, atol=1e-5)


def test_generic_quadrature_at_zero_variance():
    mean = torch.linspace(-3, 3, 7, requires_grad=True)
    var = torch.zeros(7, requires_grad=True)
    out, out_var = quadrature(torch.sigmoid, mean, var)
    assert torch.equal(out, torch.sigmoid(mean)) and (out_var == 0).all()
    slope = torch.sigmoid(mean.detach()) * torch.sigmoid(-mean.detach())
    by_mean, by_var = torch.autograd.grad(out.sum(), (mean, var), retain_graph=True)
    torch.testing.assert_close(by_mean, slope, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(by_var, 0.5 * slope * (1 - 2 * torch.sigmoid(mean.detach())), rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(torch.autograd.grad(out_var.sum(), var)[0], slope**2, rtol=2e-3, atol=1e-4)


# ---- functions without moments ---------------------------------------------------------------------------


def test_expansions_match_quadrature_for_a_narrow_positive_variable():
    mean, var = torch.tensor([2.0, 5.0], dtype=torch.float64), torch.tensor([1e-3, 1e-2], dtype=torch.float64)
    for function, f in (
        (gaussian.sqrt, torch.sqrt),
        (gaussian.rsqrt, torch.rsqrt),
        (gaussian.log, torch.log),
        (gaussian.reciprocal, torch.reciprocal),
    ):
        expected, variance = quadrature(f, mean, var)
        out, out_var = function(mean, var)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(out_var, variance, rtol=3e-3, atol=0)


def test_erf_reference_is_scipy():
    assert BY_NAME["erf"].function is special.erf


# ---- compilation -----------------------------------------------------------------------------------------


@pytest.mark.slow
@named("name", ["relu", "prelu", "hardswish", "gelu", "silu", "elu"])
def test_compiles_fullgraph(name):
    case = BY_NAME[name]

    def moments(mean, var):
        return case.moments(mean, var, *case.arguments)

    backend = "inductor" if name == "relu" else "aot_eager"
    compiled = torch.compile(moments, fullgraph=True, backend=backend)
    mean, var = torch.linspace(-4, 4, 64), torch.linspace(0, 2, 64)
    results = []
    for function in (moments, compiled):
        m, v = mean.clone().requires_grad_(), var.clone().requires_grad_()
        out = function(m, v)
        results.append((*out, *torch.autograd.grad(sum(o.sum() for o in out), (m, v))))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, rtol=2e-4, atol=2e-5)


# ---- functions spelled in several operations -------------------------------------------------------------


SPELLED = {
    "x * sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
    "x * tanh(softplus(x))": lambda x: x * torch.tanh(torch.nn.functional.softplus(x)),
    "0.5 x (1 + erf(x / sqrt 2))": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "0.5 x (1 + tanh(...))": lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3))),
    "x tanh(x)": lambda x: x * x.tanh(),
    "1 / (1 + exp(-x))": lambda x: 1 / (1 + torch.exp(-x)),
    "x / (1 + exp(-x))": lambda x: x / (1 + torch.exp(-x)),
    "2 / (1 + exp(-2x)) - 1": lambda x: 2 / (1 + torch.exp(-2 * x)) - 1,
    "log(1 + exp(x))": lambda x: torch.log(1 + torch.exp(x)),
    "log1p(exp(x))": lambda x: x.exp().log1p(),
    "x tanh(log(1 + exp(x)))": lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))),
    "log cosh x": lambda x: torch.log(torch.cosh(x)),
    "-1 / (-2 + tanh x)": lambda x: -1 / (x.tanh() - 2),
}


@named("name", SPELLED)
def test_a_function_of_several_operations_is_read_from_a_table_made_on_the_spot(name, monkeypatch):
    monkeypatch.setattr(composed, "_found", {})
    function = SPELLED[name]
    m, v = (torch.tensor(a, dtype=torch.float32) for a in GRID)
    m, v = m.requires_grad_(), v.requires_grad_()
    y = function(rvconvert.RandomVariable(m, v))
    assert y.mean.requires_grad and any(curve is not None for curve in composed._found.values())
    case = accuracy.Case(name, None, lambda x: function(torch.from_numpy(x)).numpy(), None)

    def exactly(by_mean=0.0, by_var=0.0):
        return (torch.from_numpy(a) for a in accuracy.reference(case, GRID[0] + by_mean, GRID[1] * (1 + by_var), panels=16))

    out, out_var = exactly()
    seen = out_var > 1e-6 * v
    assert ((y.mean - out).abs()[seen] < 1e-7 + 2e-5 * (out.square() + out_var).sqrt()[seen]).all()
    assert ((y.var - out_var).abs()[seen] < 2e-4 * out_var[seen]).all()
    step = 1e-4
    for mine, up, down in zip((y.mean, y.var), exactly(by_mean=step), exactly(by_mean=-step), strict=True):
        (found,) = torch.autograd.grad(mine.sum(), m, retain_graph=True)
        torch.testing.assert_close(found.double(), (up - down) / (2 * step), rtol=2e-2, atol=1e-3)
    for mine, up, down in zip((y.mean, y.var), exactly(by_var=step), exactly(by_var=-step), strict=True):
        (found,) = torch.autograd.grad(mine.sum(), v, retain_graph=True)
        torch.testing.assert_close(found.double(), (up - down) / (2 * step * torch.from_numpy(GRID[1])), rtol=2e-2, atol=1e-3)


KINKED = {
    "where(x > 0, x, x / 10)": lambda x: torch.where(x > 0, x, x / 10),
    "maximum(x, -x / 4)": lambda x: torch.maximum(x, -x / 4),
    "relu(x - 1) - 2 relu(1 - x)": lambda x: torch.relu(x - 1) - 2 * torch.relu(1 - x),
    "-2 relu(-x)": lambda x: x - torch.where(x < 0, -x, x),
    "x relu6(x + 3) / 6": lambda x: x * F.relu6(x + 3) / 6,
    "where(x > 2, 0, where(x < 1, 1, 2 - x))": lambda x: torch.where(x > 2, 0.0, torch.where(x < 1, 1.0, 2 - x)),
    "where(x > 0, x, expm1(x))": lambda x: torch.where(x > 0, x, torch.expm1(x)),
    "-relu(x) - expm1(min(x, 0))": lambda x: -torch.relu(x) - torch.expm1(x.clamp(max=0)) / 3,
}


@named("name", KINKED)
def test_a_function_with_kinks_is_known_by_its_values(name, monkeypatch):
    monkeypatch.setattr(composed, "_recognized", {})
    m, v = (torch.tensor(a, dtype=torch.float32, requires_grad=True) for a in GRID)
    y = KINKED[name](rvconvert.RandomVariable(m, v))
    assert any(composed._recognized.values())
    m64, v64 = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in GRID)
    expected = KINKED[name](rvconvert.RandomVariable(m64, v64))
    torch.testing.assert_close(y.mean.double(), expected.mean, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(y.var.double(), expected.var, rtol=1e-3, atol=1e-6)
    found = torch.autograd.grad(y.mean.sum() + y.var.sum(), (m, v))
    exact = torch.autograd.grad(expected.mean.sum() + expected.var.sum(), (m64, v64))
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=2e-2, atol=2e-3)


@named(
    "function", [F.softsign, torch.sign, lambda x: x.relu().square(), lambda x: F.threshold(x, 0.5, 0.0), lambda x: x.abs().exp()]
)
def test_what_torch_does_not_have_is_not_taken_for_it(function):
    assert recognized(function, (0.0,)) is None and recognized(function, (0.0, 0.5)) is None


BOUNDED = {
    "sqrt(1 + x^2)": lambda x: (1 + x**2) ** 0.5,
    "x / sqrt(1 + x^2)": lambda x: x * torch.rsqrt(1 + x.square()),
    "x / (1 + |x|)": lambda x: x / (1 + x.abs()),
    "1 / (1 + relu(x))": lambda x: 1 / (1 + torch.relu(x)),
    "sqrt(relu(x) + 1e-2)": lambda x: torch.sqrt(torch.relu(x) + 1e-2),
    "log(clamp(x, 0.1))": lambda x: torch.log(x.clamp(min=0.1)),
    "log10(sigmoid(x) + 0.01)": lambda x: torch.log10(torch.sigmoid(x) + 0.01),
    "log2(where)": lambda x: torch.log2(torch.where(x > 0, x.square() + 1, torch.cos(x) + 2)),
    "(3 - 2 sigmoid(x))^-1.5": lambda x: torch.pow(3 - torch.sigmoid(x) * 2, -1.5),
    "a / (b + exp(x)), a tensor": lambda x: torch.linspace(1, 2, 5).to(x.dtype) / (0.5 + torch.exp(x)),
    "reciprocal(1 + x x)": lambda x: torch.reciprocal(1 + x * x),
    "clamp(sigmoid(2x))": lambda x: torch.sigmoid(2 * x).clamp(1e-6, 1 - 1e-6),
    "clamp(tanh(x), min=0)": lambda x: torch.tanh(x).clamp(min=0.0),
    "10 ** tanh(x)": lambda x: 10 ** torch.tanh(x),
    "pow(2, 3 sigmoid(x))": lambda x: torch.pow(2.0, 3 * torch.sigmoid(x)),
    "exp2(clamp(x))": lambda x: torch.exp2(x.clamp(-1, 2)),
    "1 / maximum": lambda x: torch.div(1.0, torch.clamp_min(x, 1.0) + 1),
}


@named("name", BOUNDED)
def test_a_function_of_what_keeps_off_its_pole_is_one_function(name):
    """A root, logarithm or quotient of what is known to stay inside its domain: no lognormal law, which sees the input alone."""
    mean, var = (torch.tensor(a, requires_grad=True) for a in ([-2.0, -1.0, 0.0, 1.0, 2.0], [1.0, 2.0, 1.0, 0.5, 1.0]))
    y = BOUNDED[name](rvconvert.RandomVariable(mean, var))
    z = torch.linspace(-9, 9, 20001, dtype=torch.float64)[:, None]
    values, weight = BOUNDED[name](mean.detach() + var.detach().sqrt() * z), torch.softmax(-z * z / 2, 0)
    out = (weight * values).sum(0)
    torch.testing.assert_close(y.mean.double(), out, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(y.var.double(), (weight * (values - out).square()).sum(0), rtol=2e-2, atol=1e-3)
    gradients = torch.autograd.grad(y.mean.sum() + y.var.sum(), (mean, var))
    assert all(each.isfinite().all() for each in gradients)


LEVELS = {
    "two thresholds": lambda x: (x > 0).float() + (x > 1).float(),
    "between": lambda x: ((x > -1) & (x < 1)).float() - 0.5 * (x > 2).to(torch.float32),
    "a residual": lambda x: (x > 0).type(torch.float32) - x,
    "right": lambda x: ((x > 0.5) == torch.tensor([True, False, True, True, False])).float(),
    "wrong": lambda x: ((x > 0.5).float() != 1).float(),
    "equal": lambda x: ((x > 0.5) == (x < 1)).float(),
    "straight through": lambda x: (x > 0.5).float() - x.detach() + x,
}


@named("name", LEVELS)
def test_truth_values_are_added_as_the_numbers_that_they_are_made(name):
    mean, var = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], requires_grad=True), torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0])
    y = LEVELS[name](rvconvert.RandomVariable(mean, var))
    z = torch.linspace(-9, 9, 20001)[:, None]
    values, weight = LEVELS[name](mean.detach() + var.sqrt() * z), torch.softmax(-z * z / 2, 0)
    out = (weight * values).sum(0)
    torch.testing.assert_close(y.mean, out, rtol=0, atol=2e-3)
    torch.testing.assert_close(y.var, (weight * (values - out).square()).sum(0), rtol=1e-2, atol=2e-3)
    if name == "straight through":
        torch.testing.assert_close(torch.autograd.grad(y.mean.sum(), mean)[0], torch.ones(5))


def test_two_variables_divide_by_the_inverse_of_the_second():
    x, y = (rvconvert.RandomVariable(torch.full((3,), m), torch.full((3,), v)) for m, v in ((0.5, 2.0), (-1.0, 1.5)))
    quotient, inverse = x / (1 + torch.exp(-y)), torch.sigmoid(y)
    torch.testing.assert_close(quotient.mean, x.mean * inverse.mean, rtol=1e-4, atol=0)
    square = (x.mean.square() + x.var) * (inverse.mean.square() + inverse.var)
    torch.testing.assert_close(quotient.var, square - quotient.mean.square(), rtol=1e-3, atol=0)


@named(
    "function",
    [torch.sin, torch.floor, torch.relu, torch.square, lambda x: torch.sigmoid(40 * x - 60), lambda x: torch.exp(x.clamp(max=3))],
)
def test_no_table_serves_what_it_does_not_fit(function):
    assert composed.fitted(function) is None


def test_constants_that_change_with_every_step_do_not_make_a_table_each(monkeypatch):
    monkeypatch.setattr(composed, "_found", {})
    x = rvconvert.RandomVariable(torch.tensor([0.3, -1.2]), torch.tensor([0.4, 0.9]))
    for step in range(composed._MOST + 2):
        rate = 1 + step / 100
        y = x * torch.sigmoid(rate * x)
        expected = quadrature(lambda v, rate=rate: v * torch.sigmoid(rate * v), x.mean.double(), x.var.double())
        torch.testing.assert_close((y.mean, y.var), expected, rtol=1e-4, atol=1e-6, check_dtype=False)
    assert len(composed._found) == composed._MOST


def test_a_tensor_in_a_function_of_several_operations_gets_its_gradient(monkeypatch):
    monkeypatch.setattr(composed, "_found", {})
    x = rvconvert.RandomVariable(torch.tensor([0.3, -1.2]), torch.tensor([0.4, 0.9]))
    rate = torch.tensor(1.5, requires_grad=True)
    y = x * torch.sigmoid(rate * x)
    (found,) = torch.autograd.grad(y.mean.sum() + y.var.sum(), rate)
    step = torch.tensor(1e-3)
    moved = [(x * torch.sigmoid((rate + side * step).detach().double() * x)) for side in (1, -1)]
    slope = sum(side * (each.mean.sum() + each.var.sum()) for side, each in zip((1, -1), moved, strict=True)) / (2 * step)
    assert float(found) == pytest.approx(float(slope), rel=2e-2)
    assert len(composed._found) == 1  # of x sigmoid(x), whatever the rate


SOFTMAXES = {
    "twice": lambda h: torch.exp(h) / torch.exp(h).sum(1, keepdim=True),
    "once": lambda h: (e := h.exp()) / e.sum(dim=-1, keepdim=True),
    "sum unsqueezed": lambda h: (e := h.exp()) / e.sum(1).unsqueeze(1),
    "sum indexed": lambda h: (e := h.exp()) / e.sum(-1)[:, None],
    "sum viewed": lambda h: (e := h.exp()) / e.sum(1).view(-1, 1),
    "sum spread": lambda h: (e := h.exp()) / e.sum(1, True).expand_as(e),
    "sum unsqueezed and spread": lambda h: (e := h.exp()) / e.sum(1).unsqueeze(-1).expand(3, 4),
    "maximum unsqueezed": lambda h: (e := torch.exp(h - h.amax(1).unsqueeze(1))) / e.sum(1, True),
    "less the maximum": lambda h: (e := torch.exp(h - h.max(1, keepdim=True)[0])) / e.sum(1, keepdim=True),
    "less the maximum, in place": lambda h: (e := torch.exp(h - h.amax(-1, keepdim=True).detach())).div_(torch.sum(e, 1, True)),
}


@named("name", SOFTMAXES)
def test_a_softmax_written_out_is_one(name):
    generator = torch.Generator().manual_seed(0)
    h = rvconvert.RandomVariable(2 * torch.randn(3, 4, generator=generator), torch.rand(3, 4, generator=generator))
    made, expected = SOFTMAXES[name](h), torch.softmax(h, 1)
    torch.testing.assert_close((made.mean, made.var), (expected.mean, expected.var))


@pytest.mark.parametrize("keepdim", [False, True])
def test_a_variable_less_its_logsumexp_is_a_log_softmax(keepdim):
    generator = torch.Generator().manual_seed(0)
    h = rvconvert.RandomVariable(2 * torch.randn(4, 4, generator=generator), torch.rand(4, 4, generator=generator))
    total = torch.logsumexp(h, 1, keepdim=True) if keepdim else torch.logsumexp(h, 1)[:, None]
    made, expected = h - total, torch.log_softmax(h, 1)
    torch.testing.assert_close((made.mean, made.var), (expected.mean, expected.var))
    across = h - torch.logsumexp(h, 1)  # along the other dimension, of a square
    assert not torch.allclose(across.mean, torch.log_softmax(h, 1).mean, atol=0.1)


def test_exponentials_over_another_sum_are_no_softmax():
    h = rvconvert.RandomVariable(torch.zeros(3, 4), torch.full((3, 4), 0.1))
    square = rvconvert.RandomVariable(torch.zeros(4, 4), torch.full((4, 4), 0.1))
    across = square.exp() / square.exp().sum(1)
    assert not torch.allclose(across.var, torch.softmax(square, 1).var)
    for made in (
        h.exp() / h.exp().amax(1, keepdim=True),
        h.exp() / h.exp().sum(1)[[1, 0, 2]][:, None],
        h.exp() / (2 * h).exp().sum(1, keepdim=True),
        h.exp() / h.exp().sum(0, keepdim=True) * 1,
        h / h.exp().sum(1, keepdim=True),
    ):
        assert not torch.allclose(made.var, torch.softmax(h, 1).var)


TWICE = {
    "relu": F.relu,
    "prelu": lambda x: F.prelu(x, torch.full((1,), 0.3, dtype=x.dtype)),
    "where": lambda x: torch.where(x > 0, x, torch.full((1,), 0.3, dtype=x.dtype) * x),
    "hardswish": F.hardswish,
    "hardswish by hand": lambda x: x * F.relu6(x + 3) / 6,
    "silu": F.silu,
}


@named("name", TWICE)
def test_gradients_have_gradients(name):
    found = []
    for dtype in (torch.float32, torch.float64):
        m = torch.linspace(-4, 4, 34, dtype=dtype, requires_grad=True)
        v = torch.linspace(0.3, 2, 34, dtype=dtype, requires_grad=True)
        y = TWICE[name](rvconvert.RandomVariable(m, v))
        first = torch.autograd.grad(y.mean.square().sum() + y.var.sum(), (m, v), create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), (m, v)))
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=5e-2, atol=3e-2)
