"""A converted model is a copy in all that its code reaches, and a copy of it is one again."""

from __future__ import annotations

import collections
import copy
import functools
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import rvconvert


class Closures(nn.Module):
    """Functions of its own, as they are put on a model in ``__init__``."""

    def __init__(self, how: str = "lambda") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(12, 8), nn.Linear(4, 12)
        self.gain = nn.Parameter(torch.ones(12))
        scaled = lambda h: h * self.gain  # noqa: E731
        self.last: dict[str, Callable[[Tensor], Tensor]] = {
            "lambda": lambda h: h * self.gain,
            "nested": lambda h: scaled(h),
            "default": lambda h, gain=self.gain: h * gain,
            "hook": lambda h: h,
        }
        self.chosen = [self.last[how]]
        if how == "hook":
            self.decoder.register_forward_hook(lambda module, args, h: h * self.gain)

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.chosen[0](self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp()))


WAYS: dict[str, Callable[[Any], Any]] = {
    "converted": lambda rv: rv,
    "deepcopy": copy.deepcopy,
    "plain": rvconvert.to_plain,
    "converted again": lambda rv: rvconvert.convert(rvconvert.to_plain(rv)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["lambda", "nested", "default", "hook"])
def test_functions_that_close_over_a_model_follow_its_copy(how: str, way: str) -> None:
    vae = Closures(how)
    rv = rvconvert.convert(vae)
    rv(torch.rand(3, 12))
    made = WAYS[way](rv)
    made(torch.rand(3, 12)).square().sum().backward()
    assert made.gain.grad is not None and vae.gain.grad is None
    with torch.no_grad():
        vae.gain.zero_()
        if made is not rv:
            rv.gain.zero_()
    assert bool(made(torch.rand(3, 12)).any())


def test_in_place_they_have_the_parameters_that_there_are() -> None:
    vae = Closures()
    rvconvert.convert(vae, inplace=True)(torch.rand(3, 12)).sum().backward()
    assert vae.gain.grad is not None


@pytest.mark.parametrize("inplace", [False, True])
def test_a_scripted_part_trains(inplace: bool) -> None:
    class VAE(Closures):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.jit.script(nn.Sequential(nn.Linear(12, 8), nn.Tanh()))

    vae = VAE()
    rv = rvconvert.convert(vae, inplace=inplace)
    optimizer = torch.optim.SGD((vae if inplace else rv).parameters(), 0.1)
    before = [p.detach().clone() for p in rv.encoder.parameters()]  # type: ignore[union-attr]
    rv(torch.rand(3, 12)).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, rv.encoder.parameters(), strict=True))  # type: ignore[union-attr]
    assert inplace == torch.equal(next(vae.encoder.parameters()), next(rv.encoder.parameters()))  # type: ignore[union-attr]


def test_a_model_s_own_train_has_its_own_arguments() -> None:
    class Trains(Closures):
        def train(self, epochs: int = 3, patience: int = 5) -> Any:  # type: ignore[override]
            return epochs, patience

    rv: Any = rvconvert.convert(Trains())
    assert (rv.train(epochs=2), rv.train(10, 2), rv.train()) == ((2, 5), (10, 2), (3, 5))


@pytest.mark.parametrize("held", [dict, list])
def test_networks_in_a_plain_dict_or_list(held: type) -> None:
    """Torch knows nothing of their parameters; an optimizer made of the copy's own moves them."""

    class Unregistered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            networks = {0: nn.Linear(12, 8), 1: nn.Linear(4, 12)}
            self.networks = networks if held is dict else [*networks.values()]

        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.networks[0](x).chunk(2, 1)
            return self.networks[1](mu + torch.randn_like(mu) * (0.5 * logvar).exp())

    torch.manual_seed(0)
    registered, x = Closures(), torch.rand(3, 12)
    torch.manual_seed(0)
    rv: Any = rvconvert.convert(Unregistered())
    torch.testing.assert_close(rv(x), rvconvert.convert(registered)(x))
    assert rv.last_penalty is not None
    made = copy.deepcopy(rv)
    optimizer = torch.optim.SGD(made.networks[1].parameters(), 0.1)
    before = made(x)
    made(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(made(x), before) and torch.allclose(rv(x), before)


class AttributeDict(dict):
    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


class OwnDict(dict):
    def __init__(self, **contents):
        super().__init__(**contents)
        self.__dict__ = self


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [AttributeDict, OwnDict, types.SimpleNamespace, "module"])
def test_configurations_of_any_kind_are_copied(kind, inplace):
    class Configured(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
            self.settings = types.ModuleType("settings") if kind == "module" else kind(scale=1.0, of=kind(shift=2.0))
            if kind == "module":
                self.settings.scale, self.settings.of = 1.0, types.SimpleNamespace(shift=2.0)

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            y = self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())
            return self.settings.scale * y + self.settings.of.shift

    torch.manual_seed(0)
    x, model = torch.rand(3, 6), Configured()
    rv = rvconvert.convert(model, inplace=inplace)
    first = rv(x)
    rv.settings.scale, rv.settings.of.shift = 3.0, 1.0
    torch.testing.assert_close(rv(x), 3 * (first - 2) + 1)
    assert inplace or kind == "module" or model.settings.scale == 1


@pytest.mark.parametrize("way", ["reference", "proxy", "partial"])
def test_ways_to_a_model_s_own_layers_lead_to_the_copy_s(way):
    class Way(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
            if way == "partial":
                self.decode = functools.partial(lambda scale, z: scale * self.decoder(z), 1.0)
            else:
                self.own = (weakref.ref if way == "reference" else weakref.proxy)(self)

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            if way == "partial":
                return self.decode(z)
            return (self.own() if way == "reference" else self.own).decoder(z)

    rv = rvconvert.convert(Way())
    rv(torch.rand(3, 6)).sum().backward()
    assert rv.decoder.weight.grad is not None and rv.last_penalty > 0


def test_a_sparse_buffer_is_copied_and_left_as_it_is():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(8, 6), nn.Linear(3, 8)
            self.register_buffer("pool", torch.eye(8).to_sparse())

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            y = self.decoder(mu + (logvar / 2).exp() * torch.randn_like(mu))
            return torch.sparse.mm(self.pool, y.t()).t()

    plain, x = Pooled(), torch.rand(4, 8)
    rv = rvconvert.convert(plain, example_inputs=x)
    rv(x).sum().backward()
    assert rv.last_penalty > 0
    assert torch.equal(rvconvert.to_plain(rv).pool.to_dense(), plain.pool.to_dense())


# ---- methods that are wrapped on the instance -------------------------------------------------------------------------


class Methods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(12, 8), nn.Linear(4, 12)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.decode(mu + torch.randn_like(mu) * (0.5 * logvar).exp())


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapped


class Called:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class Slotted(Called):
    __slots__ = ("times",)

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.times = 1

    def __call__(self, *args: Any) -> Any:
        return self.times * self.function(*args)


class Named(NamedTuple):
    f: Callable[..., Any]


def recursive(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(x: Tensor, times: int = 1) -> Any:
        return wrapped(x, times - 1) if times else function(x)

    return wrapped


def mutual(function: Callable[..., Any]) -> Callable[..., Any]:
    def first(x: Tensor, times: int = 1) -> Any:
        return second(x, times) if times else function(x)

    def second(x: Tensor, times: int) -> Any:
        return first(x, times - 1)

    return first


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "function": timed,
    "autocast": torch.autocast("cpu", torch.bfloat16, enabled=False),
    "a default": lambda f: lambda x, f=f: f(x),
    "a keyword's default": lambda f: lambda *args, f=f: f(*args),
    "a partial": lambda f: timed(functools.partial(f)),
    "a list": lambda f: (lambda held: lambda *args: held[0](*args))([f]),
    "a dict": lambda f: (lambda held: lambda *args: held["f"](*args))({"f": f}),
    "an object": lambda f: timed(Called(f)),
    "an object with slots": lambda f: timed(Slotted(f)),
    "a weak reference": lambda f: (lambda held, g: lambda *args: g(held(), *args))(weakref.ref(f.__self__), f.__func__),
    "a weak proxy": lambda f: (lambda held, g: lambda *args: g(held, *args))(weakref.proxy(f.__self__), f.__func__),
    "an ordered dict": lambda f: (lambda held: lambda *args: held["f"](*args))(collections.OrderedDict(f=f)),
    "a named tuple": lambda f: (lambda held: lambda *args: held.f(*args))(Named(f)),
    "a set": lambda f: (lambda held: lambda *args: next(iter(held))(*args))({f}),
    "a queue": lambda f: (lambda held: lambda *args: held[0](*args))(collections.deque([f])),
    "itself": lambda f: recursive(f),
    "a function that holds it": lambda f: mutual(f),
    "a cache": lambda f: functools.lru_cache(f),
}
SMALL = torch.rand(3, 12)


@pytest.mark.parametrize("of_layer", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_method_or_layer_leads_to_the_copy(wrapper: str, of_layer: bool) -> None:
    vae, expected = Methods(), rvconvert.convert(Methods())
    if of_layer:
        vae.decoder.forward = WRAPPERS[wrapper](vae.decoder.forward)
    else:
        vae.decode = WRAPPERS[wrapper](vae.decode)  # type: ignore[method-assign]
    rv = rvconvert.convert(vae)
    for model in (rv, expected):
        model(SMALL).square().sum().backward()
    assert all(p.grad is None for p in vae.parameters())
    for mine, other in zip(rv.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def bound(model: nn.Module) -> Callable[..., Any]:
    """As a trainer of mixed precision does it."""
    return types.MethodType(timed(timed(model.forward.__func__)), model)  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrap", [lambda rv: timed(rv.forward), bound], ids=["closure", "bound"])
@pytest.mark.parametrize("latent", ["sample", "mean"])
def test_a_forward_that_is_wrapped_after_conversion_is_plain_again(wrap: Callable[..., Any], latent: str) -> None:
    rv = rvconvert.convert(Methods())
    rv.forward = wrap(rv)
    mean = rv(SMALL)
    plain = rvconvert.to_plain(rv, latent)
    first, second = plain(SMALL), plain(SMALL)
    assert torch.equal(first, second) == (latent == "mean")
    if latent == "mean":
        torch.testing.assert_close(first, mean)
    with torch.no_grad():
        plain.decoder.weight.zero_()
        assert torch.equal(plain(SMALL), plain.decoder.bias.expand(3, -1))
    assert torch.equal(rv(SMALL), mean)


def test_a_copy_of_a_model_whose_forward_is_bound_anew_is_converted() -> None:
    rv = rvconvert.convert(Methods())
    rv.forward = bound(rv)  # type: ignore[method-assign]
    made = copy.deepcopy(rv).eval()
    torch.testing.assert_close(made(SMALL), rv.eval()(SMALL))
    assert made.last_penalty == rv.last_penalty != 0


class Adapter(nn.Module):
    """Weights beside a frozen layer, which calls them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.change = nn.Linear(layer.in_features, layer.out_features)
        self.before, layer.forward = layer.forward, self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.before(x) + self.change(x)


def test_adapters_beside_the_model_train_in_place_and_a_copy_says_that_they_do_not() -> None:
    vae = Methods().requires_grad_(False)
    adapter = Adapter(vae.decoder)
    with pytest.warns(UserWarning, match="methods of Adapter, which is no part of it"):
        rvconvert.convert(vae)
    rvconvert.convert(vae, inplace=True)(SMALL).square().sum().backward()
    assert adapter.change.weight.grad is not None


def test_models_of_one_class_and_their_copies_are_of_one_class() -> None:
    first, second = rvconvert.convert(Methods()), rvconvert.convert(Methods())
    assert type(first) is type(second) is type(copy.deepcopy(first)) is not Methods
    stacked, _ = torch.func.stack_module_state([first, second])
    assert stacked["decoder.weight"].shape == (2, 12, 4)


def test_functions_in_objects_that_a_module_keeps_follow_the_copy() -> None:
    vae = Methods()
    vae.kept = types.SimpleNamespace(decode=lambda z: vae.decoder(z))  # type: ignore[assignment]
    vae.decode = lambda z: vae.kept.decode(z)  # type: ignore[method-assign, union-attr]
    rv = rvconvert.convert(vae)
    rv(SMALL).square().sum().backward()
    assert rv.decoder.weight.grad is not None and vae.decoder.weight.grad is None


def test_a_cycle_of_containers_ends() -> None:
    vae = Methods()
    held: list[Any] = [1]
    held.append(held)
    vae.held = held  # type: ignore[assignment]
    assert rvconvert.convert(vae)(SMALL).shape == SMALL.shape


def test_replicas_are_converted() -> None:
    """As DataParallel makes them: an object of the class, by ``__new__``."""
    rv = rvconvert.convert(Methods())
    rv(SMALL)
    replica = rv._replicate_for_data_parallel()
    replica.encoder, replica.decoder = rv.encoder, rv.decoder
    assert torch.equal(replica(SMALL), rv(SMALL))


def test_a_class_that_another_library_has_put_in_the_place_of_the_converted_one_leads_back() -> None:
    rv = rvconvert.convert(Methods())
    expected = rv(SMALL)
    rv.__class__ = type("Sharded", (type(rv),), {})
    assert torch.equal(rv(SMALL), expected)
    plain = rvconvert.to_plain(rv, latent="mean")
    torch.testing.assert_close(plain(SMALL), expected)


def test_a_method_of_what_the_model_is_a_part_of_is_no_adapter() -> None:
    class Lit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = Methods()
            self.vae.log = self.log  # type: ignore[assignment]

        def log(self, value: Any) -> None: ...

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rvconvert.convert(Lit().vae)


def test_what_a_copy_shares_with_its_model_is_left_as_it_is() -> None:
    class Shared(dict[str, Any]):
        def __deepcopy__(self, memo: Any) -> Any:
            return self

    vae = Methods()
    function = lambda z: vae.decoder(z)  # noqa: E731
    vae.registry = Shared(f=function)  # type: ignore[assignment]
    rvconvert.convert(vae)
    assert vae.registry["f"] is function  # type: ignore[index]


def test_a_container_that_counts_what_is_put_into_it_counts_nothing_more() -> None:
    class Meter(dict[str, float]):
        total = 0

        def __setitem__(self, key: str, value: float) -> None:
            type(self).total += 1
            super().__setitem__(key, value)

    vae = Methods()
    vae.meter = Meter()  # type: ignore[assignment]
    vae.meter["loss"] = 1.0  # type: ignore[index]
    copy.deepcopy(vae)
    by_deepcopy, Meter.total = Meter.total - 1, 0
    rvconvert.convert(vae)
    assert Meter.total == by_deepcopy


def test_a_hook_over_many_parameters_follows_the_copy() -> None:
    vae = Methods()
    vae.many = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(300))
    held = list(vae.many.parameters())
    vae.decoder.register_forward_hook(lambda module, args, y: y * held[-1])
    rv = rvconvert.convert(vae)
    rv(SMALL).square().sum().backward()
    assert rv.many[-1].grad is not None and vae.many[-1].grad is None  # type: ignore[union-attr, index]


def test_an_object_that_a_function_holds_is_not_followed_which_is_said() -> None:
    class Scaled:
        def __init__(self, layer: nn.Module) -> None:
            self.layer, self.run = layer, layer.forward

    vae = Methods()
    scaled = Scaled(vae.decoder)
    vae.decoder.forward = lambda z: 2 * scaled.run(z)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="hold an object of Scaled, which holds layers"):
        rvconvert.convert(vae)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rv = rvconvert.convert(vae, inplace=True)
    rv(SMALL).square().sum().backward()
    assert vae.decoder.weight.grad is not None and rv.decoder.weight is vae.decoder.weight
