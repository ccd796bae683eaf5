"""Laws that hold over all rules, whatever their exactness."""

import pytest
import torch

from rvconvert import REGISTRY, RandomVariable
from rvconvert.core.random_variable import is_in_place, propagate
from rvconvert.core.registry import operation_name
from rvconvert.rules.kinds import Collapse, Metadata
from tests.cases import CASES
from tests.oracle import Constants, leaves, tensors

RULES = {rule.name: rule for rule in REGISTRY}
RANDOM = [case for case in CASES if not isinstance(RULES[case.rule].kind, (Metadata, Collapse))]
each_case = pytest.mark.parametrize("case", RANDOM, ids=str)


def variables(moments):
    return [RandomVariable(m.clone(), v.clone()) for m, v in moments]


@each_case
def test_without_variance_it_is_the_plain_operation(case):
    """Masks of dropout in training are random by themselves; all else has variance 0."""
    if case.random:
        pytest.skip("draws by itself")
    constants = Constants()
    means = [m for m, _ in case.moments()]
    plain = tensors(case.run(constants, [m.clone() for m in means]))
    constants = Constants()
    results = leaves(case.run(constants, [RandomVariable(m, torch.zeros_like(m)) for m in means]))
    for got, expected in zip(results, plain, strict=True):
        if isinstance(got, RandomVariable):
            torch.testing.assert_close(got.mean, expected.to(got.dtype), rtol=1e-6, atol=1e-7, equal_nan=True)
            assert (got.var == 0).all()
        else:
            torch.testing.assert_close(got, expected, equal_nan=True)


@each_case
def test_shape_dtype_and_sign(case):
    for dtype in (torch.float32, torch.float64):
        constants = Constants(dtype=dtype)
        moments = case.moments(dtype)
        plain = tensors(case.run(constants, [m.clone() for m, _ in moments]))
        results = leaves(case.run(constants, variables(moments)))
        for got, expected in zip(results, plain, strict=True):
            assert got.shape == expected.shape
            if isinstance(got, RandomVariable):
                assert got.var.shape == got.shape
                assert got.var.dtype == got.dtype == (expected.dtype if expected.is_floating_point() else dtype)
                assert (got.var >= 0).all()
                assert not got.mean.isnan().any()


@each_case
def test_permuting_the_batch_permutes_the_result(case):
    if case.batch is None:
        pytest.skip("no batch")
    constants, moments = Constants(), case.moments()
    size = moments[0][0].shape[case.batch]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    straight = leaves(case.run(constants, variables(moments)))
    permuted = leaves(
        case.run(
            constants, variables([(m.index_select(case.batch, order), v.index_select(case.batch, order)) for m, v in moments])
        )
    )
    for a, b in zip(straight, permuted, strict=True):
        if isinstance(a, RandomVariable):
            torch.testing.assert_close(a.mean.index_select(case.batch, order), b.mean)
            torch.testing.assert_close(a.var.index_select(case.batch, order), b.var)


@each_case
def test_gradients_are_finite_also_without_variance(case):
    constants = Constants(dtype=torch.float32)
    for scale in (1.0, 0.0):
        leaf = [(m.requires_grad_(), (v * scale).requires_grad_()) for m, v in case.moments(torch.float32)]
        results = leaves(case.run(constants, [RandomVariable(m * 1, v * 1) for m, v in leaf]))
        finite = [
            part[part.isfinite()].sum()
            for got in results
            if isinstance(got, RandomVariable)
            for part in (got.mean, got.var)
            if part.requires_grad
        ]
        if not finite:
            continue
        inputs = [part for pair in leaf for part in pair]
        for gradient in torch.autograd.grad(sum(finite), inputs, allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


@each_case
def test_a_graph_of_the_backward_pass_leaves_gradients_as_they_are(case):
    """Where a variance is made of a mean, too."""
    found = []
    for create_graph in (False, True):
        leaf = [m.requires_grad_() for m, _ in case.moments(torch.float32)]
        made = [m * 1 for m in leaf]
        given = [
            RandomVariable(m, v * (1 + 0.1 * m.square())) for m, (_, v) in zip(made, case.moments(torch.float32), strict=True)
        ]
        results = leaves(case.run(Constants(dtype=torch.float32), given))
        parts = [part for got in results if isinstance(got, RandomVariable) for part in (got.mean, got.var)]
        finite = [part[part.isfinite()].sum() for part in parts if part.requires_grad]
        if not finite:
            pytest.skip("no gradient")
        found.append(torch.autograd.grad(sum(finite), leaf, create_graph=create_graph, allow_unused=True))
    for with_graph, without in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(with_graph, without, rtol=2e-3, atol=2e-4)


def calls_of(case, inputs, monkeypatch):
    """The calls of the case's own rule that a run makes: (func, args, kwargs)."""
    import rvconvert.core.random_variable as core

    found = []

    def spy(func, args, kwargs):
        rule = REGISTRY.find(func)
        if rule is not None and rule.name == case.rule:
            kept = tuple(x.snapshot() if isinstance(x, RandomVariable) else x for x in args)
            found.append((func, kept, dict(kwargs)))
        return propagate(func, args, kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(core, "propagate", spy)
        case.run(Constants(), inputs)
    return found


def at_means(value):
    if isinstance(value, RandomVariable):
        origin = value.origin
        plain = None if origin is None else origin.function(origin.parent.mean)
        return plain if plain is not None and plain.dtype == torch.bool else value.mean.clone()  # an indicator
    if isinstance(value, (list, tuple)):
        return type(value)(at_means(each) for each in value)
    return value.clone() if isinstance(value, torch.Tensor) else value


def fresh(value):
    if isinstance(value, RandomVariable):
        return RandomVariable(value.mean.clone(), value.var.clone())
    if isinstance(value, (list, tuple)):
        return type(value)(fresh(each) for each in value)
    return value.clone() if isinstance(value, torch.Tensor) else value


def same(a, b):
    a, b = tensors(a), tensors(b)
    return len(a) == len(b) and len(a) > 0 and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_case
def test_every_spelling_that_is_the_same_on_tensors_is_the_same_on_random_variables(case, monkeypatch):
    if case.random:
        pytest.skip("draws by itself")
    calls = calls_of(case, variables(case.moments()), monkeypatch)
    if not calls:
        pytest.skip("the case reaches its rule through another operation's own Python")
    func, args, kwargs = calls[0]
    expected_plain = func(*at_means(args), **at_means_of(kwargs))
    expected = leaves(propagate(func, fresh(args), {k: fresh(v) for k, v in kwargs.items()}))
    for other, rule in REGISTRY.served():
        if rule.name != case.rule or other is func:
            continue
        for arguments in (args, args[::-1]):
            if is_in_place(other, kwargs) and not isinstance(arguments[0], RandomVariable):
                continue
            try:
                plain = other(*at_means(arguments), **at_means_of(kwargs))
            except Exception:
                continue
            if not same(plain, expected_plain):
                continue
            results = leaves(propagate(other, fresh(arguments), {k: fresh(v) for k, v in kwargs.items()}))
            for got, wanted in zip(results, expected, strict=True):
                if isinstance(got, RandomVariable):
                    torch.testing.assert_close(got.mean, wanted.mean, msg=operation_name(other), equal_nan=True)
                    torch.testing.assert_close(got.var, wanted.var, msg=operation_name(other))


def at_means_of(kwargs):
    return {key: at_means(value) for key, value in kwargs.items()}


@pytest.mark.parametrize("case", [c for c in CASES if c.modules], ids=str)
def test_modules_are_their_functions(case):
    for make in case.modules:
        module = make().double()
        moments = case.moments()
        expected = leaves(case.run(Constants(), variables(moments)))
        results = leaves(module(*variables(moments)))
        for got, wanted in zip(results, expected, strict=True):
            if isinstance(got, RandomVariable):
                torch.testing.assert_close(got.mean, wanted.mean)
                torch.testing.assert_close(got.var, wanted.var)
            else:
                torch.testing.assert_close(got, wanted)


def test_an_operation_in_place_changes_its_variable_and_no_tensor():
    for name in ("relu_", "mul_", "unsqueeze_", "masked_fill_", "zero_", "fill_", "clamp_", "index_fill_", "copy_", "cumsum_"):
        arguments = {
            "mul_": (2.0,),
            "unsqueeze_": (0,),
            "masked_fill_": (torch.tensor([True, False]), 3.0),
            "fill_": (1.0,),
            "clamp_": (-0.1, 0.1),
            "index_fill_": (0, torch.tensor([1]), 5.0),
            "copy_": (torch.tensor([7.0, 8.0]),),
            "cumsum_": (0,),
        }.get(name, ())
        mean, var = torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 0.25])
        x = RandomVariable(mean, var)
        result = getattr(x, name)(*arguments)
        assert result is x, name
        assert mean.tolist() == [-1.0, 2.0] and var.tolist() == [0.5, 0.25], name
        plain = torch.tensor([-1.0, 2.0])
        expected = getattr(plain, name)(*arguments)
        assert x.shape == expected.shape, name
        if name in ("zero_", "fill_", "copy_"):
            torch.testing.assert_close(x.mean, expected)
            assert (x.var == 0).all()


@pytest.mark.parametrize("case", [c for c in CASES if not c.random][::4], ids=str)
def test_a_result_depends_on_no_random_state(case):
    results = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            constants = Constants()
            torch.manual_seed(seed)
            results.append(leaves(case.run(constants, variables(case.moments()))))
    for a, b in zip(*results, strict=True):
        if isinstance(a, RandomVariable):
            assert torch.equal(a.mean.nan_to_num(), b.mean.nan_to_num()) and torch.equal(a.var, b.var)
