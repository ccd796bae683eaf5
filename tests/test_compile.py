"""torch.compile of converted models, and the kernels that compile where that is asked for."""

import copy
import inspect
import logging

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import rvconvert
from rvconvert import RandomVariable, converted
from rvconvert import moments as gaussian
from rvconvert.core.registry import REGISTRY
from rvconvert.moments import compilation


class VAE(nn.Module):
    """Small, with each kind of layer that a decoder is made of; one in-place activation, one skip."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(12, 8)
        self.decoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Unflatten(1, (2, 2, 2)))
        self.up = nn.ConvTranspose2d(2, 3, 2, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        mu, logvar = self.encoder(x.flatten(1)).chunk(2, 1)
        std = torch.exp(0.5 * logvar)
        h = self.decoder(mu + torch.randn_like(std) * std)
        h = F.leaky_relu(self.norm(self.up(h)))
        return 1 - h.mul(0.5), mu, logvar


def model_and_data(**options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    x = torch.rand(8, 3, 2, 2)
    return rvconvert.convert(VAE(), example_inputs=x, **options), x


def train_step(module, model, x):
    model.zero_grad()
    out, mu, _ = module(x)
    loss = F.mse_loss(out, x) + mu.square().mean()
    loss.backward()
    return loss.detach(), model.last_penalty, [p.grad.clone() for p in model.parameters()]


def graphs():
    return counters["stats"]["unique_graphs"]


def test_training_compiles_whole_and_once():
    model, x = model_and_data()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        results, expected = train_step(compiled, model, x), train_step(eager, eager, x)
        torch.testing.assert_close(results, expected)
    assert graphs() == 1
    for size in (5, 3, 5, 8):  # a last batch that is smaller: one graph for every size
        torch.testing.assert_close(train_step(compiled, model, x[:size]), train_step(eager, eager, x[:size]))
    assert graphs() == 2
    torch.testing.assert_close(model.state_dict(), eager.state_dict())  # the running statistics too
    for mode in (model, eager):
        mode.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x))
    assert graphs() == 3
    for mode in (model, eager):
        mode.train()
    torch.testing.assert_close(train_step(compiled, model, x), train_step(eager, eager, x))
    assert graphs() == 3
    copied = copy.deepcopy(compiled)
    torch.testing.assert_close(copied(x), eager(x))


def test_what_only_a_compiled_loop_calls_was_called(recwarn):
    model, x = model_and_data()
    train_step(torch.compile(model, backend="eager"), model, x)
    model.state_dict()
    assert not [each for each in recwarn if "never called" in str(each.message)]


def test_under_an_earlier_compiler_a_converted_method_runs_eagerly(monkeypatch):
    monkeypatch.setattr(converted, "_COMPILES", False)
    model, x = model_and_data()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        results, expected = train_step(compiled, model, x), train_step(eager, eager, x)
        torch.testing.assert_close(results, expected, rtol=0, atol=0)
        assert float(model.last_penalty) == float(eager.last_penalty) > 0
    assert graphs() == 0


@pytest.mark.parametrize("covariance", ["independent", "calibrated"])
def test_a_model_that_was_never_called_compiles_after_its_first_call(covariance):
    model, x = model_and_data(covariance=covariance)
    eager = copy.deepcopy(model)
    unseen = rvconvert.convert(VAE(), covariance=covariance)
    unseen.load_state_dict(model.state_dict())
    compiled = torch.compile(unseen, backend="aot_eager")
    for _ in range(3):
        results, expected = train_step(compiled, unseen, x), train_step(eager, eager, x)
        if covariance == "independent":
            torch.testing.assert_close(results, expected)
        assert unseen.last_penalty > 0
    assert graphs() == 2
    unseen.eval()
    compiled(x)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="example_inputs"):
        torch.compile(rvconvert.convert(VAE()), fullgraph=True, backend="eager")(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: x * t,
        lambda x, t: t * x,
        lambda x, t: t - x,
        lambda x, t: 1 - x / 2,
        lambda x, t: x.add_(1).mul(t),
        lambda x, t: torch.cat([x, x], 1)[:, 1:].view(-1),
        lambda x, t: torch.matmul(torch.addcmul(t, t, x).T, t),  # Dynamo swaps the operands of x @ t where x is no tensor
        lambda x, t: x * torch.sigmoid(x),
        lambda x, t: F.relu(x).chunk(2, 1)[1],
        lambda x, t: x.reshape(x.size(0), -1).square(),
    ],
    ids="mul rmul rsub rsub_number in_place cat matmul silu chunk square".split(),
)
def test_operations_of_a_random_variable_compile(function):
    def moments(mean, var, t):
        x = function(RandomVariable(mean, var), t)
        return x.mean, x.var

    torch._dynamo.reset()
    arguments = torch.randn(3, 4), torch.rand(3, 4), torch.randn(3, 4)
    compiled = torch.compile(moments, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), moments(*arguments))


ACTIVATIONS = [kind for rule in REGISTRY for kind in rule.modules if kind.__module__ == "torch.nn.modules.activation"]
SIZES = {nn.Threshold: (0.1, 0.0)}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "kind", [kind for kind in ACTIVATIONS if kind is not nn.MultiheadAttention], ids=lambda kind: kind.__name__
)
def test_a_compiled_activation_gives_what_an_eager_one_gives(kind, inplace):
    if inplace and "inplace" not in inspect.signature(kind).parameters:
        pytest.skip("has no in-place form")
    layer = kind(*SIZES.get(kind, ()), **({"inplace": True} if inplace else {})).eval()

    def moments(mean, var):
        x = layer(RandomVariable(mean * 2, var))
        return x.mean, x.var

    torch.manual_seed(0)
    torch._dynamo.reset()
    arguments = torch.randn(3, 4, 4), torch.rand(3, 4, 4)
    torch.testing.assert_close(torch.compile(moments, backend="eager")(*arguments), moments(*arguments))


def test_a_deterministic_model_is_one_in_a_compiled_call_too():
    model, x = model_and_data()
    model(x)
    plain = rvconvert.to_plain(model.eval(), latent="mean")
    found, again = (torch.compile(plain, backend="eager")(x)[0] for _ in range(2))
    assert torch.equal(found, again)
    torch.testing.assert_close(found, plain(x)[0])


def test_a_matrix_product_inside_a_model_compiles():
    class Product(VAE):
        def forward(self, x):
            mu = self.encoder(x.flatten(1))[:, :4]
            return (mu + torch.randn_like(mu)) @ self.decoder[0].weight.t() @ self.encoder.weight, mu

    torch._dynamo.reset()
    x = torch.rand(8, 12)
    model = rvconvert.convert(Product(), example_inputs=x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x)[0], model(x)[0])


def test_a_persons_rule_compiles():
    rules = rvconvert.REGISTRY.overlay()

    @rvconvert.rule(F.leaky_relu, registry=rules)
    def halve(x, negative_slope=0.01, inplace=False):
        return RandomVariable(x.mean / 2, x.var / 4)

    model, x = model_and_data(rules=rules)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], model(x)[0])
    assert not torch.allclose(model(x)[0], model_and_data()[0](x)[0])


# ---- kernels ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_kernels(monkeypatch):
    """Kernels compile, and run in blocks, from a few elements on."""
    monkeypatch.setattr(compilation, "BLOCK", 16)
    monkeypatch.setattr(compilation, "SMALL", 8)
    monkeypatch.setattr(compilation, "_compiled", {})
    monkeypatch.setattr(compilation, "_enabled", True)


def gradients(function, *tensors):
    tensors = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    results = function(*tensors)
    return (*results, *torch.autograd.grad(sum((x * w).sum() for x, w in zip(results, (1.0, 3.0), strict=True)), tensors))


LAYOUTS = {
    "dense": lambda: torch.randn(2, 3, 4, 5),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "slice": lambda: torch.randn(2, 3, 4, 10)[..., ::2],
    "expanded": lambda: torch.randn(2, 3, 1, 1).expand(2, 3, 4, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [gaussian.relu, gaussian.leaky_relu, gaussian.tanh], ids=lambda f: f.__name__)
def test_blocks_give_what_the_kernel_gives(function, layout, small_kernels, monkeypatch):
    mean, var = LAYOUTS[layout](), torch.rand(2, 3, 4, 5)
    compilation.disable()
    blocks = gradients(function, mean, var)
    monkeypatch.setattr(compilation, "BLOCK", 1 << 20)
    torch.testing.assert_close(blocks, gradients(function, mean, var))


def test_kernels_that_compile_give_what_plain_ones_give(small_kernels):
    sizes = [(2, 3, 4, 5), (7, 31), (300,)]
    for function in (gaussian.relu, gaussian.silu, gaussian.elu):
        for size in sizes:  # one compilation serves every size and layout
            mean, var = torch.randn(size), torch.rand(size) ** 4
            compilation.enable()
            compiled = gradients(function, mean, var)
            compilation.disable()
            torch.testing.assert_close(compiled, gradients(function, mean, var))
    assert len(compilation._compiled) == 6


def test_a_graph_of_the_backward_pass_bypasses_the_kernels(small_kernels):
    mean, var = torch.randn(100, requires_grad=True), torch.rand(100, requires_grad=True)
    out, _ = gaussian.relu(mean, var)
    (first,) = torch.autograd.grad(out.sum(), mean, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), mean)
    expected = torch.exp(-0.5 * mean.square() / var) / (2 * torch.pi * var).sqrt()
    torch.testing.assert_close(second, expected.detach())


def test_without_a_compiler_there_is_one_line_and_the_plain_kernel(small_kernels, monkeypatch, caplog):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no working C++ compiler\nlong story")

    monkeypatch.setattr(compilation, "_specialised", lambda kernel, constants: no_compiler)
    mean, var = torch.randn(100), torch.rand(100)
    with caplog.at_level(logging.INFO, logger="rvconvert"):
        first, second = gradients(gaussian.relu, mean, var), gradients(gaussian.relu, mean, var)
    assert [record.getMessage() for record in caplog.records] == [
        "rvconvert: no compiled kernels, training will be slower (no working C++ compiler)"
    ]
    assert not compilation.is_enabled()
    torch.testing.assert_close(first, second)
