"""Every registered rule against the oracle: Monte Carlo, and dense quadrature where it is elementwise."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rvconvert
from rvconvert import REGISTRY, RandomVariable
from rvconvert.core.registry import Exactness
from rvconvert.rules.kinds import Collapse, Elementwise, Metadata, Read
from tests.cases import CASES
from tests.oracle import Constants, leaves, monte_carlo, tensors

RULES = {rule.name: rule for rule in REGISTRY if not isinstance(rule.kind, Read)}


def propagated(case, constants, moments):
    return leaves(case.run(constants, [RandomVariable(m.clone(), v.clone()) for m, v in moments]))


def test_every_rule_has_a_case_and_every_case_a_rule():
    tested = {case.rule for case in CASES}
    assert sorted(set(RULES) - tested) == []
    assert sorted(tested - set(RULES)) == []


def test_every_rule_serves_a_function():
    served = {rule.name for _, rule in REGISTRY.served()}
    assert sorted(name for name, rule in RULES.items() if name not in served and rule.body is None) == []


def test_only_approximate_rules_are_allowed_an_error():
    loose = {case.rule for case in CASES if case.mean_error or case.var_error}
    assert {name for name in loose if RULES[name].exactness is not Exactness.APPROXIMATE} == set()


MODULES = sorted({m for rule in REGISTRY for m in rule.modules}, key=lambda m: m.__name__)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_module_class_of_a_rule_is_in_a_case(module):
    built = set()
    for case in CASES:
        if module in RULES[case.rule].modules:
            constants = Constants()
            case.run(constants, [m for m, _ in case.moments()])
            built |= {type(each) for each in constants.made} | {type(make()) for make in case.modules}
    assert module in built


SCALED = [pytest.param(case, scale, id=f"{case}-{scale}") for case in CASES if not case.composed for scale in case.scales]


@pytest.mark.parametrize(("case", "scale"), SCALED)
def test_moments(case, scale):
    rule = RULES[case.rule]
    constants, moments = Constants(scale), case.moments()
    results = propagated(case, constants, moments)
    plain = tensors(case.run(constants, [m.clone() for m, _ in moments]))
    assert len(results) == len(plain)
    if isinstance(rule.kind, (Metadata, Collapse)):
        for got, expected in zip(results, plain, strict=True):
            assert isinstance(got, torch.Tensor)
            torch.testing.assert_close(got, expected, equal_nan=True)
        return
    estimates = iter(monte_carlo(case, constants, moments))
    for got, expected in zip(results, plain, strict=True):
        if not isinstance(got, RandomVariable):
            assert not expected.is_floating_point() or case.rule == "broadcast_tensors"  # indices are those of the means
            if expected.is_floating_point() or expected.dtype == torch.bool:
                next(estimates)
            continue
        estimate = next(estimates)
        scale = estimate.var.clamp(min=estimate.var.mean().item())
        deviation = scale.sqrt()
        allowed = estimate.mean_error + case.mean_error * deviation + 1e-9 * (1 + estimate.mean.abs())
        error = torch.where(got.mean == estimate.mean, 0.0, got.mean - estimate.mean).abs()
        where = int((error - allowed).argmax())
        assert (error <= allowed).all(), (
            f"mean {got.mean.flatten()[where]:.5f}, sampled {estimate.mean.flatten()[where]:.5f} "
            f"({((error / deviation).flatten()[where]):.3f} deviations off)"
        )
        allowed = estimate.var_error + case.var_error * scale + 1e-9
        error = (got.var - estimate.var).abs()
        where = int((error - allowed).argmax())
        assert (error <= allowed).all(), (
            f"var {got.var.flatten()[where]:.5f}, sampled {estimate.var.flatten()[where]:.5f}, "
            f"ratio {(got.var / estimate.var).flatten()[where]:.3f}"
        )


ELEMENTWISE = [
    case
    for case in CASES
    if case.rule in RULES
    and isinstance(RULES[case.rule].kind, Elementwise)
    and RULES[case.rule].exactness is not Exactness.APPROXIMATE
    and len(case.shapes) == 1
]


@pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
def test_elementwise_moments_against_dense_quadrature(case):
    constants, moments = Constants(), case.moments()
    (got,) = propagated(case, constants, moments)
    ((mean, var),) = moments
    nodes = torch.linspace(-9, 9, 6001, dtype=torch.float64)
    weights = torch.exp(-0.5 * nodes.square())
    weights = (weights / weights.sum()).reshape(-1, *(1,) * mean.ndim)
    values = mean + var.sqrt() * nodes.reshape(weights.shape)
    f = torch.func.vmap(lambda x: case.run(constants, [x]).to(torch.float64))(values)
    centre = f[f.shape[0] // 2]
    expected = centre + (weights * (f - centre)).sum(0)
    variance = (weights * (f - expected).square()).sum(0)
    tolerance = 2e-3 if case.kinked else 2e-5
    torch.testing.assert_close(got.mean, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.var, variance, rtol=5 * tolerance, atol=tolerance)


@pytest.mark.parametrize("name", "sum mean var std prod amax logsumexp softmax log_softmax cumsum cumprod".split())
def test_numpys_names_of_arguments_are_torchs(name):
    x = RandomVariable(1 + torch.rand(3, 4), 0.01 * torch.rand(3, 4))
    function = getattr(torch, name)
    keep = name in ("sum", "mean", "var", "std", "prod", "amax", "logsumexp")
    expected = function(x, dim=1, **({"keepdim": True} if keep else {}))
    found = function(x, axis=1, **({"keepdims": True} if keep else {}))
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.var, expected.var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["none", "half", "float32"])
def test_batch_norm_of_half_precision_is_that_of_float32(parameters, dtype):
    torch.manual_seed(0)
    mean, var = torch.randn(4, 3, 6, 5).to(dtype).requires_grad_(), torch.rand(4, 3, 6, 5).to(dtype).requires_grad_()
    rest = [None, None] if parameters == "none" else [torch.rand(3).to(dtype if parameters == "half" else torch.float32)] * 2

    def moments(mean, var, weight, bias):
        out = F.batch_norm(RandomVariable(mean, var), None, None, weight, bias, training=True)
        return (out.mean, out.var, *torch.autograd.grad(out.mean.float().sin().sum() + out.var.float().sum(), (mean, var)))

    wide = moments(mean.float(), var.float(), *(x if x is None else x.float() for x in rest))
    for found, expected in zip(moments(mean, var, *rest), wide, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_eval_mode_is_the_plain_layer_and_its_square_with_and_without_gradients(affine, dtype):
    torch.manual_seed(0)
    layer = torch.nn.BatchNorm2d(3, affine=affine).to(dtype)
    for each in layer.state_dict().values():
        each.copy_(torch.rand(each.shape) + 0.5)
    layer.eval()
    mean, var = torch.randn(4, 3, 6, 5).to(dtype), torch.rand(4, 3, 6, 5).to(dtype)
    gain2 = (layer.weight.detach().square() if affine else 1) / (layer.running_var + layer.eps)
    precise = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    kept = mean.clone(), var.clone()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = layer(RandomVariable(mean, var))
        assert out.mean.dtype == out.var.dtype == dtype
        torch.testing.assert_close(out.mean, layer(mean), **precise)
        torch.testing.assert_close(out.var, var * gain2.view(3, 1, 1), **precise)
    assert torch.equal(mean, kept[0]) and torch.equal(var, kept[1])


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("normalized", ["group_norm", "instance_norm", "batch_norm"])
def test_normalization_of_many_elements_has_the_gradients_of_its_formula(normalized, order):
    torch.manual_seed(0)
    mean, var = torch.randn(2, 2, 12, 11, dtype=torch.float64), torch.rand(2, 2, 12, 11, dtype=torch.float64)
    inputs = [x.contiguous(memory_format=order).requires_grad_() for x in (mean, var)]
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def moments(mean, var, weight, bias):
        x = RandomVariable(mean, var)
        if normalized == "group_norm":
            out = F.group_norm(x, 1, weight, bias)
        elif normalized == "instance_norm":
            out = F.instance_norm(x, weight=weight, bias=bias)
        else:
            out = F.batch_norm(x, None, None, weight, bias, training=True)
        return out.mean, out.var

    assert torch.autograd.gradcheck(moments, (*inputs, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(moments, (*inputs, weight, bias), fast_mode=True)


SELF_PRODUCTS = {
    "matmul": lambda z: z @ z.mT,
    "transpose on the left": lambda z: torch.matmul(z.transpose(-1, -2), z),
    "bmm": lambda z: torch.bmm(z, z.permute(0, 2, 1)),
    "einsum": lambda z: torch.einsum("bik,bjk->bij", z, z),
    "einsum over rows": lambda z: torch.einsum("bki,bkj->bji", z, z),
    "dot": lambda z: (lambda y: torch.dot(y, y))(z.flatten()),
    "vector": lambda z: (lambda y: y @ y)(z[0, 0]),
    "einsum of elements": lambda z: torch.einsum("bik,bik->bi", z, z),
    "einsum of all": lambda z: torch.einsum("bik,bik->", z, z),
    "vecdot": lambda z: torch.linalg.vecdot(z, z),
    "inner": lambda z: (lambda y: torch.inner(y, y))(z[0]),
    "inner of vectors": lambda z: (lambda y: torch.inner(y, y))(z[0, 0]),
    "tensordot": lambda z: torch.tensordot(z, z, ([0, 1, 2], [0, 1, 2])),
    "tensordot of rows": lambda z: (lambda y: torch.tensordot(y, y, ([1], [1])))(z[0]),
    "outer": lambda z: (lambda y: torch.outer(y, y))(z[0, 0]),
}


def assert_moments_of_draws(function):
    """Of a variable of shape (2, 4, 3), against 50,000 draws of it."""
    generator = torch.Generator().manual_seed(0)
    mean, var = torch.randn(2, 4, 3, generator=generator), torch.rand(2, 4, 3, generator=generator)
    draws = mean + var.sqrt() * torch.randn(50_000, 2, 4, 3, generator=generator)
    found, sampled = function(RandomVariable(mean, var)), torch.func.vmap(function)(draws)
    error = (found.mean - sampled.mean(0)).abs() / (sampled.std(0) / len(draws) ** 0.5)
    assert error.max() < 4.5
    assert (found.var / sampled.var(0) - 1).abs().max() < 0.06


@pytest.mark.parametrize("name", SELF_PRODUCTS)
def test_a_product_of_a_matrix_and_its_own_transpose_has_squares_on_the_diagonal(name):
    assert_moments_of_draws(SELF_PRODUCTS[name])


def test_a_product_with_another_matrix_or_a_changed_one_has_none():
    mean, var = torch.randn(4, 3), torch.rand(4, 3)
    z, other = RandomVariable(mean, var), RandomVariable(mean, var)
    torch.testing.assert_close((z @ other.t()).mean, mean @ mean.t())
    y = z.t()
    z += 1.0  # the variable written over is another one than the one transposed
    torch.testing.assert_close((other @ y).mean, mean @ mean.t())
    square = RandomVariable(mean[:3], var[:3])
    torch.testing.assert_close((square @ square).mean, mean[:3] @ mean[:3])  # not its transpose
    changed = square.t()
    changed += RandomVariable(mean[:3], var[:3])  # what is written over is the transpose no more
    torch.testing.assert_close((square @ changed).mean, mean[:3] @ (mean[:3].t() + mean[:3]))


SELECTED_TWICE = {
    "an index": lambda z: z[0] * z[0],
    "a slice": lambda z: z[:, 1:3] * z[:, 1:3],
    "an index of a slice": lambda z: z[:, 1:][..., 0] * z[:, 1:][..., 0],
    "a chunk": lambda z: z.chunk(2, 1)[1] * z.chunk(2, 1)[1],
    "a new dimension": lambda z: z.unsqueeze(1) * z.unsqueeze(1),
    "another shape": lambda z: z.flatten(1) * torch.sigmoid(z.flatten(1)),
    "joined": lambda z: torch.cat([z, z[:, :1]], 1) * torch.cat([z, z[:, :1]], 1),
    "rows": lambda z: z[0] @ z[0].t(),
    "two chunks": lambda z: z.chunk(2, 1)[0] * z.chunk(2, 1)[1],
    "two elements": lambda z: z[0] * z[1],
}


@pytest.mark.parametrize("name", SELECTED_TWICE)
def test_what_is_selected_twice_in_one_way_is_one_variable(name):
    assert_moments_of_draws(SELECTED_TWICE[name])


def test_what_is_selected_before_and_after_a_change_are_two_variables():
    z = RandomVariable(torch.randn(2, 3), torch.rand(2, 3))
    before = z[0]
    z *= 2.0
    assert before.key != z[0].key
    assert z[0].key == z[0].key != z[1].key
    assert z[True].key != z[1].key


@pytest.mark.parametrize("n", [2, 3, 9, 200])
def test_a_norm_of_one_feature_among_equal_ones_has_no_negative_variance(n):
    """Its scale is lost whatever it is, so that its variance is next to 0, a sum of terms that cancel."""
    mean = torch.zeros(500, n)
    mean[:, 0] = torch.linspace(-40, 40, 500)
    var = torch.rand(500, n, generator=torch.Generator().manual_seed(0))
    x = RandomVariable(mean, var)
    for out in (F.layer_norm(x, (n,), eps=1e-12), F.group_norm(x, 1, eps=1e-12), F.instance_norm(x[:, None], eps=1e-12)):
        assert bool((out.var >= 0).all())


@pytest.mark.parametrize("copy", [lambda x: x, torch.clone, torch.detach, lambda x: x.float()])
def test_a_term_taken_from_a_sum_again_leaves_the_other_one(copy):
    class Hierarchy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)

        def forward(self, z):
            lower = self.first(z)
            whole = copy(z + lower)
            return lower, whole - copy(z), whole - lower, z

    rv = rvconvert.convert(Hierarchy(), random_inputs=("z",), output="distribution")
    lower, first, second, z = rv(RandomVariable(torch.randn(4, 3), torch.rand(4, 3)))
    torch.testing.assert_close((first.mean, first.var), (lower.mean, lower.var))
    torch.testing.assert_close((second.mean, second.var), (z.mean, z.var))


@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_a_softmax_that_is_certain_has_no_negative_variance(function):
    mean, var = 30 * torch.randn(400, 5, generator=torch.Generator().manual_seed(0)), torch.rand(400, 5)
    var[:, 1:] *= 1e-6
    assert bool((function(RandomVariable(mean, var), 1).var >= 0).all())
