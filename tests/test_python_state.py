"""What a method reads from Python and leaves there: annealed attributes, flags, its own random numbers, meters and lists."""

import argparse
import collections
import copy
import cProfile
import functools
import logging
import math
import operator
import random
import statistics
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rvconvert

MODES = ("independent", "calibrated", "sampled", "lowrank")
BETA = 0.0
ARGUMENTS = argparse.Namespace(beta=0.0)
WEIGHTS = {"beta": 0.0}
SCHEDULE = np.zeros(3, dtype=np.float32)


HELPED = {"beta": 0.0}
NESTED = {"model": {"loss": {"kl": {"beta": 0.0}}}}
TENSOR = torch.zeros(())
settings = sys.modules["settings_of_a_script"] = types.ModuleType("settings_of_a_script")
settings.beta = 0.0
package = types.ModuleType("package_of_a_script")
package.settings = types.ModuleType("package_of_a_script.settings")
package.settings.beta = 0.0
LONG_SCHEDULE = np.zeros(3000)


def no_more(x):
    return x


def weight_by_a_helper():
    return HELPED["beta"] + settings.beta


def weight_of_its_own():
    return weight_of_its_own.beta


weight_of_its_own.beta = 0.0


def closures():
    """A function of a variable that it closes over, one that calls another such function, and what sets both."""
    beta, held = 0.0, {"beta": 0.0}

    def assigned(value):
        nonlocal beta
        beta = value

    def inner():
        return held["beta"]

    return lambda: beta, lambda: 1 * inner(), assigned, held


ENCLOSED, ENCLOSED_TWICE, enclose, ENCLOSED_HELD = closures()


class CONFIGURATION:
    """As people write one."""

    beta = 0.0


class Slotted:
    """An object without a ``__dict__``."""

    __slots__ = ("beta",)

    def __init__(self):
        self.beta = 0.0

    def __call__(self):
        return self.beta

    def read(self):
        return self.beta


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 6))

    def encode(self, x):
        return self.encoder(x).chunk(2, 1)

    def reconstruct(self, x, temperature=1.0):
        mu, logvar = self.encode(x)
        return self.decoder(mu + temperature * torch.randn_like(mu) * (0.5 * logvar).exp())

    def forward(self, x):
        return self.reconstruct(x)


@torch.no_grad()
def take_variance(model):
    """A posterior without variance: the converted model then does what the plain one does."""
    model.encoder.weight[2:], model.encoder.bias[2:] = 0, -80


class Annealed(VAE):
    """Each number of Python that the loss is made of is read in another way."""

    of_the_class = 0.0

    def __init__(self):
        super().__init__()
        self.of_the_model = 0.0
        self.decoder.part = nn.Identity()
        self.part = Part()
        self.held = {"beta": 0.0, "names": ["a", "b"]}
        self.config = types.SimpleNamespace(schedule=types.SimpleNamespace(beta=0.0))
        self.of_numpy, self.array, self.slotted = np.float32(0), np.zeros(2), Slotted()
        self.long, self.chosen = [0.0] * 100, {0.0}
        self.times = 0
        self.encoder.shift = 0.0
        of = types.SimpleNamespace
        self.nested = of(model=of(loss={"kl": of(beta=0.0)}))
        self.function, self.tensors = no_more, (torch.zeros(()), {"beta": torch.zeros(())})
        self.bound, self.partial = Slotted().read, functools.partial(operator.getitem, {"beta": 0.0}, "beta")

    def forward(self, x):
        y = self.reconstruct(x)
        total = self.of_the_class + self.of_the_model + self.held["beta"] + self.config.schedule.beta + BETA
        total = total + ARGUMENTS.beta + WEIGHTS["beta"] + CONFIGURATION.beta + SCHEDULE[1]
        total = total + self.of_numpy + self.array[1] + self.slotted() + self.long[80] + sum(self.chosen)
        total = total + self.nested.model.loss["kl"].beta + NESTED["model"]["loss"]["kl"]["beta"] + Part.beta
        total = total + weight_by_a_helper() + TENSOR + self.function(0.0) + self.tensors[0] + self.tensors[1]["beta"]
        total = total + package.settings.beta + weight_of_its_own() + float(LONG_SCHEDULE[7])
        total = total + ENCLOSED() + ENCLOSED_TWICE() + self.bound() + self.partial() + self.encoder.shift
        for _ in range(self.times):
            total = total + 1
        if self.of_the_model > 100:
            total = total * 2
        return self.part((y - x).square().mean()) + total


class Part(nn.Module):
    shift = beta = 0.0

    def forward(self, x):
        return x + self.shift


def of_held(model, value):
    model.held["beta"] = value


def of_config(model, value):
    model.config.schedule.beta = value


def of_part(model, value):
    model.part.shift = value


def of_global(model, value):
    global BETA
    BETA = value


def of_arguments(model, value):
    ARGUMENTS.beta = value


def of_global_dict(model, value):
    WEIGHTS["beta"] = value


def of_global_array(model, value):
    SCHEDULE[1] = value


def of_global_class(model, value):
    CONFIGURATION.beta = value


def of_array(model, value):
    model.array[1] = value


def of_slots(model, value):
    model.slotted.beta = value


def of_a_long_list(model, value):
    model.long[80] = value


def of_a_set(model, value):
    model.chosen.clear()
    model.chosen.add(value)


def of_global_tensor(model, value):
    global TENSOR
    TENSOR = torch.tensor(value)


def of_a_module_of_a_package(model, value):
    package.settings.beta = value


def of_a_function(model, value):
    weight_of_its_own.beta = value


def of_a_long_array(model, value):
    LONG_SCHEDULE[7] = value


def of_a_partial(model, value):
    model.partial.args[0]["beta"] = value


def times(model, value):
    model.times = int(value)


WAYS = {
    "class": lambda model, value: setattr(model, "of_the_class", value),
    "model": lambda model, value: setattr(model, "of_the_model", value),
    "dict": of_held,
    "object": of_config,
    "submodule": of_part,
    "global": of_global,
    "loop": times,
    "arguments": of_arguments,
    "global dict": of_global_dict,
    "global array": of_global_array,
    "global class": of_global_class,
    "numpy": lambda model, value: setattr(model, "of_numpy", np.float32(value)),
    "array": of_array,
    "slots": of_slots,
    "long list": of_a_long_list,
    "set": of_a_set,
    "helper's global": lambda model, value: HELPED.update(beta=value),
    "imported module": lambda model, value: setattr(settings, "beta", value),
    "enclosed variable": lambda model, value: enclose(value),
    "enclosed dict of a helper": lambda model, value: ENCLOSED_HELD.update(beta=value),
    "bound method": lambda model, value: setattr(model.bound.__self__, "beta", value),
    "partial": of_a_partial,
    "nested": lambda model, value: setattr(model.nested.model.loss["kl"], "beta", value),
    "nested dicts": lambda model, value: NESTED["model"]["loss"]["kl"].update(beta=value),
    "class of the model's": lambda model, value: setattr(Part, "beta", value),
    "global tensor": of_global_tensor,
    "module of a package": of_a_module_of_a_package,
    "attribute of a function": of_a_function,
    "long array": of_a_long_array,
    "function": lambda model, value: setattr(model, "function", lambda x: x + value),
    "tuple of tensors": lambda model, value: setattr(model, "tensors", (torch.tensor(value), model.tensors[1])),
    "tensor in a dict": lambda model, value: model.tensors[1].update(beta=torch.tensor(value)),
    "torch layer": lambda model, value: setattr(model.encoder, "shift", value),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_a_number_of_python_that_changes_between_calls_is_read_anew(way, mode):
    torch.manual_seed(0)
    x = torch.rand(5, 6)
    model = rvconvert.convert(Annealed(), covariance=mode, seed=0, example_inputs=x).eval()
    with torch.no_grad():
        free = float(model(x))
        for value in (3.0, 7.0, 3.0, 0.0):
            WAYS[way](model, value)
            assert float(model(x)) == pytest.approx(free + value, rel=1e-4)
    others = way in ("function", "global tensor")  # each time another object
    assert len(rvconvert.converted.conversion_of(model).programs) <= (6 if others else 4)  # one for each value, found again


class Settings:
    """A class that a model holds as its configuration, and one that has a single object."""

    beta, single = 0.0, None

    class Loss:
        beta = 0.0

    @classmethod
    def get(cls):
        cls.single = cls.single or cls()
        return cls.single


class Annealer:
    horizon = 1.0

    def weight(self):
        return 1 / self.horizon


def weight_of_a_notebook():
    return 0.0


class Late(VAE):
    """Reads what is not there at the first call, or is there in another place than it is changed at."""

    def __init__(self, how):
        super().__init__()
        self.how, self.settings, self.annealer = how, Settings, Annealer()

    def weight(self):
        return 0.0

    def forward(self, x):
        ways = {
            "class": lambda: self.settings.beta,
            "class in a class": lambda: Settings.Loss.beta,
            "single object": lambda: Settings.get().beta,
            "class of an object": lambda: self.annealer.weight(),
            "optional": lambda: getattr(self, "beta", 0.0),
            "flag": lambda: 1.0 if hasattr(self, "warm") else 0.0,
            "method": lambda: self.weight(),
            "defined again": lambda: weight_of_a_notebook(),
        }
        return self.reconstruct(x, 0.0) + ways[self.how]()


def define_again(model, value):
    global weight_of_a_notebook
    weight_of_a_notebook = lambda: value  # noqa: E731 (as a cell that is run again)


LATE = {
    "class": lambda model, value: setattr(Settings, "beta", value),
    "class in a class": lambda model, value: setattr(Settings.Loss, "beta", value),
    "single object": lambda model, value: setattr(Settings.get(), "beta", value),
    "class of an object": lambda model, value: setattr(Annealer, "horizon", 1 + value),
    "optional": lambda model, value: setattr(model, "beta", value),
    "flag": lambda model, value: setattr(model, "warm", True),
    "method": lambda model, value: setattr(model, "weight", lambda: value),
    "defined again": define_again,
}


@pytest.mark.parametrize("how", LATE)
def test_what_appears_or_is_replaced_after_the_first_call_is_read(how):
    x, plain = torch.rand(5, 6), Late(how)
    rv = rvconvert.convert(plain)
    for value in (None, None, 0.5, 1.5):
        if value is not None:
            LATE[how](plain, value)
            LATE[how](rv, value)
        torch.testing.assert_close(rv(x), plain(x))


class Averaged(VAE):
    """Keeps what its first call makes."""

    def __init__(self, how):
        super().__init__()
        self.how, self.seen = how, collections.Counter()

    def forward(self, x):
        y = self.reconstruct(x, 0.0)
        if self.how == "counter":
            self.seen["calls"] += 1
            return y * self.seen["calls"]
        if self.how == "attribute":
            self.average = 0.5 * self.average if hasattr(self, "average") else torch.tensor(1.0)
            return y * self.average
        if not hasattr(self, "average"):
            self.register_buffer("average", torch.tensor(1.0))
        self.average.mul_(0.5)
        return y * self.average


@pytest.mark.parametrize("how", ["attribute", "buffer", "counter"])
def test_what_the_first_call_makes_the_next_ones_change(how):
    x, plain = torch.rand(5, 6), Averaged(how)
    rv = rvconvert.convert(plain)
    for _ in range(4):
        torch.testing.assert_close(rv(x), plain(x))


@pytest.mark.parametrize("profiled", [False, True])
def test_a_variable_of_a_function_that_forward_makes_costs_no_recording(profiled):
    class Inner(VAE):
        def forward(self, x):
            scales = []

            def scaled(h):
                scales.append(len(scales) + 1)
                return h * scales[-1]

            return scaled(scaled(self.reconstruct(x)))

    x, rv, seen = torch.rand(5, 6), rvconvert.convert(Inner()), []
    profiler = lambda frame, event, argument: seen.append(frame.f_code.co_name)  # noqa: E731
    sys.setprofile(profiler if profiled else None)
    try:
        for _ in range(3):
            rv(x)
        assert sys.getprofile() is (profiler if profiled else None)
    finally:
        sys.setprofile(None)
    assert len(rvconvert.converted.conversion_of(rv).programs) == 1
    assert ("scaled" in seen) == profiled


def test_a_model_is_converted_under_cprofile():
    profile, rv = cProfile.Profile(), rvconvert.convert(Annealed()).eval()
    profile.enable()
    try:
        rv(torch.rand(5, 6))
    finally:
        profile.disable()
    assert any("torch" in str(each.code) for each in profile.getstats())


def test_a_branch_by_such_a_number_is_taken():
    x = torch.rand(5, 6)
    model = rvconvert.convert(Annealed()).eval()
    with torch.no_grad():
        free = float(model(x))
        model.of_the_model = 200.0
        assert float(model(x)) == pytest.approx(free + 400)


MOVED = {  # of a decoded sample, and two numbers that each call has others of: what the graph takes as they come
    "weight": lambda y, k, j: y * (k + 2 * j),
    "power": lambda y, k, j: (y * j).abs() ** k,
    "slope": lambda y, k, j: j * F.leaky_relu(y, k),
    "bounds": lambda y, k, j: y.clamp(-k, j),
    "filled": lambda y, k, j: y * torch.full_like(y, k) + torch.tensor([j]),
    "root": lambda y, k, j: y * k**0.5 * (1 - k) ** 0.5,
}
DECIDED = {  # and by which Python decides, or which it takes the value of unseen
    "branch": lambda y, k, j: y * (k if k > 0.5 else j),
    "math": lambda y, k, j: y * math.exp(k) * math.sqrt(j),
    "numpy": lambda y, k, j: y * float(np.multiply(k, j)),
    "floor": lambda y, k, j: y * 0.5 ** math.floor(10 * k) * (1 + round(10 * j)),
    "saturated": lambda y, k, j: y * min(1.0, math.exp(2 - 5 * k)) * math.tanh(40 * j),
    "Python's own": lambda y, k, j: y * statistics.mean([k, j]),
}


class Moved(VAE):
    def __init__(self, use):
        super().__init__()
        self.use, self.k, self.j = use, 0.5, 0.5

    def forward(self, x, k=None, *, j=None):
        y = self.reconstruct(x, self.j if j is None else j)
        return self.use(y, self.k if k is None else k, self.j if j is None else j)


@pytest.mark.parametrize("mode", ["independent", "sampled"])
@pytest.mark.parametrize("by", ["attributes", "arguments"])
@pytest.mark.parametrize("name", [*MOVED, *DECIDED])
def test_floats_that_change_with_every_call_have_their_value_and_one_recording(name, by, mode):
    torch.manual_seed(0)
    model, x = Moved({**MOVED, **DECIDED}[name]), torch.rand(5, 6)
    rv = rvconvert.convert(model, covariance=mode, output="distribution", seed=0)
    for step in range(6):
        k, j = 0.2 + 0.1 * step, 0.9 - 0.1 * step
        given = {"k": k, "j": j} if by == "arguments" else {}
        for each in (rv, model) if by == "attributes" else ():
            each.k, each.j = k, j
        found, right = rv(x, **given), rvconvert.convert(model, covariance=mode, output="distribution", seed=0)(x, **given)
        torch.testing.assert_close(found.mean, right.mean)
        torch.testing.assert_close(found.var, right.var)
    assert len(rvconvert.converted.conversion_of(rv).programs) <= (2 if name in MOVED else 6)


def test_a_copy_of_a_model_with_an_annealed_weight_reads_its_own():
    rv, x = rvconvert.convert(Moved(MOVED["weight"])).eval(), torch.rand(5, 6)
    with torch.no_grad():
        for rv.k in (0.1, 0.2, 0.3):
            rv(x)
        other = copy.deepcopy(rv)
        other.k = 1.5
        torch.testing.assert_close(other(x) * 1.3, rv(x) * 2.5)


def test_a_number_that_changes_with_every_call_is_named_once():
    x = torch.rand(5, 6)
    model = rvconvert.convert(Annealed())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(60):
            model.of_the_model = step / 60
            model(x)
    (said,) = [str(each.message) for each in caught]
    assert said.startswith("model.of_the_model changed between calls") and "register_buffer" in said


class Chance(VAE):
    def __init__(self, draws):
        super().__init__()
        self.draws = draws

    def forward(self, x):
        return self.reconstruct(x * 0 + 9 if self.draws() < 0.3 else x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("draws", [lambda: random.random(), lambda: np.random.random()], ids=["random", "numpy"])
def test_what_python_draws_is_drawn_at_every_call(draws, mode):
    random.seed(0)
    np.random.seed(0)
    x = torch.zeros(2, 6)
    model = rvconvert.convert(Chance(draws), covariance=mode, seed=0).eval()
    with torch.no_grad():
        found = [float(model(x).sum()) for _ in range(60)]
    values = {round(value, 3) for value in found}
    assert len(values) == 2
    assert 8 <= min(sum(round(value, 3) == each for value in found) for each in values) <= 30


GENERATOR = np.random.default_rng(0)


class Drawn(VAE):
    def forward(self, x):
        return self.reconstruct(x * 0 + 9 if GENERATOR.random() < 0.5 else x)


def test_a_generator_among_the_globals_draws_at_every_call():
    model, x = rvconvert.convert(Drawn()).eval(), torch.zeros(2, 6)
    with torch.no_grad():
        assert len({round(float(model(x).sum()), 3) for _ in range(30)}) == 2


def test_a_recording_does_not_advance_the_random_numbers_of_python():
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        model = VAE()
        random.seed(5)
        np.random.seed(5)
        if converted:
            rvconvert.convert(model, example_inputs=torch.rand(3, 6))(torch.rand(3, 6))
        found.append((random.random(), np.random.random()))
    assert found[0] == found[1]


class Meter:
    def __init__(self):
        self.total, self.count = 0.0, 0

    def update(self, value):
        self.total += value
        self.count += 1


class Notes(VAE):
    def __init__(self, *, item):
        super().__init__()
        self.item, self.meter, self.losses, self.history, self.copied = item, Meter(), {}, [], []

    def forward(self, x):
        y = self.reconstruct(x)
        loss = F.mse_loss(y, x)
        value = loss.item() if self.item else loss.detach()
        self.meter.update(value)
        self.losses["reconstruction"] = loss
        self.history.append(value)
        self.copied = [*self.copied, value]
        return y


class Meters(VAE):
    """What is written to stands in another container, under a private name, or in an array."""

    def __init__(self):
        super().__init__()
        self.nested, self.recent, self.seen, self.calls = {"losses": []}, collections.deque(maxlen=2), set(), np.zeros(1)
        self._log, self._meter, self.meters = [], Meter(), {"loss": Meter()}
        self.history = types.SimpleNamespace(losses=[])

    def forward(self, x):
        y = self.reconstruct(x)
        value = F.mse_loss(y, x).item()
        self.seen.add(len(self.seen))
        self.calls += 1
        for notes in (self.nested["losses"], self.recent, self._log, self.history.losses):
            notes.append(value)
        for meter in (self._meter, self.meters["loss"]):
            meter.update(value)
        return y


@pytest.mark.parametrize("mode", MODES)
def test_what_a_method_notes_in_containers_within_containers_is_noted_at_every_call(mode):
    x = torch.rand(5, 6)
    model = rvconvert.convert(Meters(), covariance=mode, example_inputs=x)
    nested, meter = model.nested["losses"], model.meters["loss"]
    for _ in range(4):
        model(x)
    assert len(model.nested["losses"]) == len(model._log) == len(model.history.losses) == len(model.seen) == 4
    assert len(model.recent) == 2 and model.calls == 4 and model._meter.count == model.meters["loss"].count == 4
    assert nested is model.nested["losses"] and meter is model.meters["loss"]
    for each in (model._meter, meter):
        assert each.total == pytest.approx(sum(model._log), rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("item", [False, True])
def test_what_a_method_notes_in_lists_dicts_and_meters_is_noted_at_every_call(item, mode):
    x = torch.rand(5, 6)
    model = rvconvert.convert(Notes(item=item), covariance=mode, example_inputs=x)
    for _ in range(4):
        y = model(x)
    assert model.meter.count == len(model.history) == len(model.copied) == 4
    assert float(model.history[-1]) == pytest.approx(float(F.mse_loss(y, x)), rel=1e-4)
    assert float(model.meter.total) == pytest.approx(sum(map(float, model.history)), rel=1e-4)
    assert float(model.losses["reconstruction"]) == pytest.approx(float(F.mse_loss(y, x)), rel=1e-4)
    assert type(model.meter.total) is (float if item else torch.Tensor)


COUNTER = {"calls": 0}


class Counting(VAE):
    def forward(self, x):
        COUNTER["calls"] += 1
        return self.reconstruct(x)


def test_a_global_that_the_method_itself_changes_is_changed_at_every_call():
    x = torch.rand(5, 6)
    model = rvconvert.convert(Counting(), example_inputs=x)
    model(x)
    before = COUNTER["calls"]
    for _ in range(3):
        model(x)
    assert COUNTER["calls"] == before + 3


def _noted(model):
    model.history.append(1)
    model.state = model.state + len(model.history)


STATES = {
    "assigned": lambda model: setattr(model, "state", 2 * model.state),
    "in place": lambda model: model.state.mul_(2),
    "by data": lambda model: setattr(model.state, "data", 2 * model.state.data),
    "in a dict": lambda model: model.held.update(state=2 * model.held["state"]),
    "in a dict in place": lambda model: model.held["state"].mul_(2),
    "by a list's length": _noted,
}


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("name", STATES)
def test_a_state_that_a_call_reads_and_changes_is_the_plain_model_s(name, buffer, once):
    """A hidden state on the model, read before it is written; recorded once, or at every call."""

    class Stateful(VAE):
        def __init__(self):
            super().__init__()
            self.calls, self.history, self.held = 0, [], {"state": torch.ones(6)}
            if buffer:
                self.register_buffer("state", torch.ones(6))
            else:
                self.state = torch.ones(6)

        def forward(self, x):
            self.calls += once
            read = x.new_zeros(6) + self.state + self.held["state"]
            y = self.reconstruct(x)
            STATES[name](self)
            return y, read

    plain, x = Stateful(), torch.rand(5, 6)
    rv = rvconvert.convert(plain)
    for _ in range(4):
        torch.testing.assert_close(rv(x)[1], plain(x)[1])
        torch.testing.assert_close(rv.state, plain.state)
        torch.testing.assert_close(rv.held["state"], plain.held["state"])


def test_what_is_put_on_a_model_for_a_call_that_takes_it_away():
    class Guided(VAE):
        guide = None

        def forward(self, x):
            y = self.reconstruct(x) + self.guide[:, :1]
            self.guide = None
            return y

    rv, x, given = rvconvert.convert(Guided()), torch.rand(5, 6), []
    for step in range(3):
        rv.guide = torch.full((5, 6), float(step))
        given.append(rv(x) - step)
        assert rv.guide is None
    torch.testing.assert_close(given[1], given[0])
    torch.testing.assert_close(given[2], given[0])


@functools.lru_cache(None)
def _folded(batch, width):
    return batch * 2, width // 2


@functools.lru_cache(None)
def _positions(width):
    return torch.linspace(0, 1, width)


CACHED = {
    "numbers": lambda z: z.reshape(_folded(*z.shape)).reshape(z.shape),
    "numbers made of": lambda z: z.reshape(-1, _folded(*z.shape)[1] * 2),
    "a tensor": lambda z: z + _positions(z.shape[1]),
}


@pytest.mark.parametrize("name", CACHED)
def test_what_a_model_caches_by_size_serves_every_recording(name):
    """A cache by size, as of einops, keeps numbers of the recording that filled it."""

    class Caches(VAE):
        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            return self.decoder(CACHED[name](mu + torch.randn_like(mu) * (0.5 * logvar - 20).exp()))

    _folded.cache_clear()
    _positions.cache_clear()
    plain = Caches()
    for rv in (rvconvert.convert(plain), rvconvert.convert(plain)):
        for training in (True, False):
            for batch in (4, 7, 4, 5):
                x = torch.rand(batch, 6)
                expected = rv.decoder(CACHED[name](rv.encoder(x).chunk(2, 1)[0]))
                torch.testing.assert_close(rv.train(training)(x), expected)


class WritesParameters(nn.Module):
    """``write(model, y)`` is called between the decoder and what leaves."""

    def __init__(self, write, counts: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(8, 6), nn.Linear(3, 8)
        self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.write, self.counts, self.calls, self.ready = write, counts, 0, False

    def forward(self, x):
        if self.counts:
            self.calls += 1
        mu, logvar = self.encoder(x).chunk(2, -1)
        y = self.decoder(mu + (0.5 * logvar).exp() * torch.randn_like(mu))
        before = y * self.scale + self.shift
        self.write(self, y)
        return y * self.scale + self.shift, before, mu


def by_an_average(model, y):
    with torch.no_grad():
        model.scale.mul_(0.9).add_(0.05)
    model.shift.data.add_(1.0)


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("example", [True, False])
def test_parameters_written_in_forward_are_written_once_a_call(counts, example):
    x = torch.randn(5, 8)
    plain, rv = WritesParameters(by_an_average, counts), WritesParameters(by_an_average, counts)
    rv = rvconvert.convert(rv, example_inputs=x if example else None)
    for _ in range(3):
        with torch.no_grad():
            expected, found = plain(x), rv(x)
        for name in ("scale", "shift"):
            assert torch.equal(getattr(plain, name), getattr(rv, name))
        assert torch.equal(expected[2], found[2])


def by_data(model, y):
    if not model.ready:
        model.ready = True
        model.shift.data.fill_(3.0)
        model.scale.data = model.scale.data * (0.5 / y.std(0))
        model.shift.data = model.shift.data + 7.0


def in_place(model, y):
    if not model.ready:
        model.ready = True
        with torch.no_grad():
            model.shift.zero_()
            model.shift.copy_(-y.mean(0))
            model.scale.fill_(2.0)
            model.scale.mul_(0.25 / y.std(0))


@pytest.mark.parametrize("write", [by_data, in_place])
def test_an_initialization_by_the_first_batch_in_several_writes_stands(write):
    x = torch.randn(512, 8)
    plain, rv = WritesParameters(write, False), rvconvert.convert(WritesParameters(write, False))
    for _ in range(2):
        plain(x), rv(x)
        assert torch.allclose(plain.scale, rv.scale, rtol=0.2)
        assert torch.allclose(plain.shift, rv.shift, atol=0.2)


class _Stepwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def training_step(self, x, index):
        return self.loss(x)

    def weighed_step(self, x, index):
        return self.loss(x) * (index + 1)

    def nested_step(self, x, index):
        return (lambda: self.loss(x) * (index + 1))()

    def loss(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        return (self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)) - x).square().mean()


@pytest.mark.parametrize(("name", "recordings"), [("training_step", 1), ("weighed_step", 2), ("nested_step", 2)])
def test_a_number_that_each_call_has_another_of_makes_few_recordings(name, recordings):
    torch.manual_seed(0)
    model, x = rvconvert.convert(_Stepwise(), methods=(name,)), torch.randn(8, 6)
    losses = [float(getattr(model, name)(x, index)) for index in range(5)]
    assert len(model._rvconvert.programs) == recordings
    for index, loss in enumerate(losses):
        assert loss == pytest.approx(losses[0] * (1 if recordings == 1 else index + 1))


def of_a_new_generator(model, x):
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(42))


def of_a_seeded_generator(model, x):
    return torch.rand(x.shape, generator=model.generator.manual_seed(42))


def of_the_forked_state(model, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        return torch.rand_like(x)


def of_a_generator_that_goes_on(model, x):
    return torch.rand(x.shape, generator=model.generator)


@pytest.mark.parametrize("mode", ["independent", "sampled"])
@pytest.mark.parametrize("draw", [of_a_new_generator, of_a_seeded_generator, of_the_forked_state, of_a_generator_that_goes_on])
def test_a_mask_that_forward_seeds_is_the_plain_model_s(draw, mode):
    class Masked(VAE):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator()

        def forward(self, x):
            mask = (draw(self, x) > 0.5).float()
            return self.reconstruct(x * mask), mask

    model, x = Masked(), torch.rand(16, 6)
    rv = rvconvert.convert(model, covariance=mode)
    masks = [rv(x)[1] for _ in range(3)]
    if draw is of_a_generator_that_goes_on:
        assert not any(torch.equal(a, b) for a, b in ((masks[0], masks[1]), (masks[1], masks[2]), (masks[0], masks[2])))
    else:
        assert all(torch.equal(mask, model(x)[1]) for mask in masks)
    assert rv(x[:5])[1].shape == (5, 6)


def test_a_latent_under_a_seed_is_a_latent():
    class Seeded(VAE):
        def forward(self, x):
            torch.manual_seed(0)
            return self.reconstruct(x)

    y = rvconvert.convert(Seeded(), output="distribution")(torch.rand(5, 6))
    assert bool((y.var > 0).all())


LOGGER = logging.getLogger("a script's")


def test_a_logger_that_remembers_its_levels_makes_no_recording():
    """The first call of one leaves a cache on it; once torch.export then found no recording that it could use."""

    class Logging(VAE):
        def forward(self, x):
            LOGGER.debug("a batch of %d", len(x))
            return self.reconstruct(x)

    rv, x = rvconvert.convert(Logging()), torch.rand(5, 6)
    for level in (logging.WARNING, logging.INFO, logging.ERROR):
        LOGGER.setLevel(level)
        rv(x)
    assert len(rvconvert.converted.conversion_of(rv).programs) == 1


def _capacity(model, y, mu):
    """As a beta-VAE's loss is often spelt."""
    model.num_iter += 1
    target = torch.clamp(model.capacity / 1000 * model.num_iter, 0, model.capacity.item())
    return (mu.square().sum() - target).abs()


def _steps(model, y, mu):
    model.step += 1
    model.seen += len(y)
    return model.step / 4 * mu.square().sum() + model.seen * mu.sum()


def _growth(model, y, mu):
    model.beta *= 1.1
    return model.beta * mu.square().sum()


def _average(model, y, mu):
    model.average = 0.9 * model.average + 0.1 * mu.square().mean().item()
    return model.average * mu.sum()


def _reported(model, y, mu):
    """What goes into GECO's moving average is random, and the average is returned for a log."""
    model.average = 0.9 * model.average + 0.1 * y.square().mean().item()
    return mu.sum(), model.average


def _warm_up(model, y, mu):
    model.step += 1
    return min(1.0, model.step / 4) * mu.square().sum()


def _cycle(model, y, mu):
    model.step += 1
    if model.step % 3 == 0:
        model.seen += 1
    return model.seen * mu.square().sum()


COUNTING = {_capacity: True, _steps: True, _growth: True, _average: True, _reported: True, _warm_up: False, _cycle: False}


@pytest.mark.parametrize("use", COUNTING, ids=lambda use: use.__name__)
def test_numbers_that_the_method_counts_by_are_the_plain_model_s(use):
    """Kept recordings where Python decides nothing by them; else one recording a call."""

    class Counts(VAE):
        num_iter = 0

        def __init__(self):
            torch.manual_seed(0)
            super().__init__()
            self.step, self.seen, self.beta, self.average = 0, 0, 1.0, 0.0
            self.capacity = torch.tensor([25.0])

        def forward(self, x):
            mu, logvar = self.encode(x)
            y = self.decoder(mu + 0 * torch.randn_like(mu) * logvar)
            return use(self, y, mu)

    plain, rv, x = Counts(), rvconvert.convert(Counts()), torch.rand(6, 6)
    names = ("num_iter", "step", "seen", "beta", "average")
    for call in range(8):
        batch = x if call % 3 else x[:4]
        torch.testing.assert_close(rv(batch), plain(batch))
        for name in names:
            assert getattr(rv, name) == pytest.approx(getattr(plain, name)) and type(getattr(rv, name)) is type(
                getattr(plain, name)
            )
    assert bool(rvconvert.converted.conversion_of(rv).once) is not COUNTING[use]
    assert rvconvert.plan(plain, example_inputs=x).lifetime == ("kept" if COUNTING[use] else "once")


SEEN = {  # a draw of a number behind the posterior's, and what Python does by it
    "list": lambda y, u: y[:, : 1 + int(u.tolist()[0] * 5)],
    "item": lambda y, u: y.roll(torch.multinomial(u, 1).item(), 1)[:, : torch.randint(1, 6, ()).item()],
    "branch": lambda y, u: -y if u[0] < 0.5 else y,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SEEN)
def test_a_draw_that_python_decides_by_is_the_one_that_is_returned(name, mode):
    class Seen(VAE):
        def forward(self, x):
            y = self.reconstruct(x)
            u = torch.rand(6)
            return SEEN[name](y, u), u

    rv, x = rvconvert.convert(Seen(), covariance=mode, seed=0), torch.rand(5, 6)
    drawn, kept = set(), None
    for seed in range(12):
        torch.manual_seed(seed)
        y, u = rv(x)
        drawn.add(float(u[0]))
        if name == "list":
            assert y.shape == (5, 1 + int(u.tolist()[0] * 5))
        elif name == "branch" and mode in ("independent", "lowrank"):
            signed = (y if u[0] >= 0.5 else -y).detach()
            kept = signed if kept is None else kept
            torch.testing.assert_close(signed, kept)
    assert len(drawn) == 12


class Staged(nn.Module):
    """Decodes by what it keeps under another name."""

    def __init__(self, choose, decode):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoders = nn.Linear(6, 4), nn.ModuleList(nn.Linear(2, 6) for _ in range(2))
        self.choose, self.by = choose, decode
        choose(self, 0)

    def first(self, z):
        return self.decoders[0](z)

    def second(self, z):
        return self.decoders[1](z).sigmoid()

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.by(self, mu + 1e-4 * torch.randn_like(mu) * logvar)


def stage(name):
    return lambda vae, i: setattr(vae, name, getattr(vae, ("first", "second")[i]))


STAGES = {
    "a layer by a second name": (lambda vae, i: setattr(vae, "current", vae.decoders[i]), lambda vae, z: vae.current(z)),
    "layers in a list": (lambda vae, i: setattr(vae, "active", [vae.decoders[i]]), lambda vae, z: vae.active[0](z)),
    "layers in a dictionary": (lambda vae, i: setattr(vae, "routes", {"d": vae.decoders[i]}), lambda vae, z: vae.routes["d"](z)),
    "a method": (stage("method"), lambda vae, z: vae.method(z)),
    "a layer's method": (lambda vae, i: setattr(vae, "run", vae.decoders[i].forward), lambda vae, z: vae.run(z)),
    "methods in a list": (
        lambda vae, i: setattr(vae, "methods", [(vae.first, vae.second)[i]]),
        lambda vae, z: vae.methods[0](z),
    ),
    "a method with arguments": (
        lambda vae, i: setattr(vae, "bound", functools.partial((vae.first, vae.second)[i])),
        lambda vae, z: vae.bound(z),
    ),
    "a function of torch": (
        lambda vae, i: setattr(vae, "activation", (torch.sigmoid, torch.tanh)[i]),
        lambda vae, z: vae.activation(vae.first(z)),
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_what_is_kept_under_another_name_may_be_another_one_later(name):
    choose, decode = STAGES[name]
    vae = Staged(choose, decode)
    rv, x = rvconvert.convert(vae), torch.rand(3, 6)
    for i in (0, 1, 0):
        choose(vae, i)
        choose(rv, i)
        torch.testing.assert_close(rv(x), vae(x), rtol=0, atol=2e-3)
    recorded = len(rv._rvconvert.programs)
    copied = copy.deepcopy(rv)
    copied(x)
    assert len(copied._rvconvert.programs) == recorded


criterion = nn.MSELoss()
activation = torch.sigmoid


class OfGlobals(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        return criterion(activation(self.decoder(mu + 1e-4 * torch.randn_like(mu) * logvar)), x)


def test_a_global_layer_or_function_may_be_another_one_later(monkeypatch):
    vae, x = OfGlobals(), torch.rand(3, 6)
    rv = rvconvert.convert(vae)
    torch.testing.assert_close(rv(x), vae(x), rtol=1e-3, atol=0)
    for name, value in (("criterion", nn.L1Loss()), ("activation", torch.tanh)):
        monkeypatch.setitem(globals(), name, value)
        torch.testing.assert_close(rv(x), vae(x), rtol=1e-3, atol=0)


STEPS = 0
HISTORY = collections.deque(maxlen=100)
PROGRESS = types.SimpleNamespace(step=0, seen={"steps": []})


def _global_number():
    global STEPS
    STEPS += 1
    return STEPS


def _deque():
    HISTORY.append(1)
    return len(HISTORY)


def _object():
    PROGRESS.step += 1
    PROGRESS.seen["steps"].append(PROGRESS.step)
    return len(PROGRESS.seen["steps"])


class Clock:
    __slots__ = ("ticks",)
    total = 0


CLOCK, TICKS = Clock(), np.zeros(2, dtype=np.int64)
CLOCK.ticks = 0


def _class_and_slots():
    Clock.total += 1
    CLOCK.ticks += 1
    return Clock.total + CLOCK.ticks - Clock.total


def _array():
    TICKS[1] += 1
    return int(TICKS[1])


def _closure():
    calls = []

    def advance():
        calls.append(1)
        return len(calls)

    return advance


COUNT, RUNNING = torch.zeros(()), {"mean": torch.zeros(2)}


def _tensor():
    return COUNT.add_(1) * 1


def _running_mean():
    with torch.no_grad():
        RUNNING["mean"][1] += 1
    return RUNNING["mean"].sum()


def _out():
    torch.add(COUNT, 1, out=COUNT)
    return COUNT * 1


def _many():
    torch._foreach_add_([COUNT, RUNNING["mean"]], 1.0)
    return COUNT * 1


def _default(count=torch.zeros(1)):  # noqa: B008
    count += 1
    return count.sum()


class Advancing(VAE):
    def __init__(self, advance):
        super().__init__()
        self.advance = advance

    def forward(self, x):
        return self.reconstruct(x), self.advance()


GLOBAL_MODULE = nn.Module()
GLOBAL_MODULE.register_buffer("count", torch.zeros(()))
BANK = {number: torch.zeros(()) for number in range(300)}
DEEP = {"a": {"b": {"c": {"d": {"e": {"f": {"g": torch.zeros(())}}}}}}}
TABLE = np.frombuffer(np.arange(6, dtype=np.float32).tobytes(), np.float32)


class Holder:
    count = torch.zeros(())


def _module():
    return GLOBAL_MODULE.count.add_(1) * 1


def _class_attribute():
    return Holder.count.add_(1) * 1


def _large():
    return BANK[299].add_(1) * 1


def _deep():
    return DEEP["a"]["b"]["c"]["d"]["e"]["f"]["g"].add_(1) * 1


def _parameter():
    with torch.no_grad():
        PARAMETERS[0].add_(1)
    return PARAMETERS[0].detach() * 1


PARAMETERS = [nn.Parameter(torch.zeros(())) for _ in range(300)]


def _beside_what_cannot_be_written():
    return COUNT.add_(TABLE[1].item()) * 1


ADVANCES = [
    _global_number, _deque, _object, _class_and_slots, _array, _closure(), _tensor, _running_mean, _out, _many, _default, _module,
    _class_attribute, _large, _deep, _parameter, _beside_what_cannot_be_written,
]  # fmt: skip


@pytest.mark.parametrize("covariance", ["independent", "calibrated", "sampled"])
@pytest.mark.parametrize("advance", ADVANCES)
def test_what_is_outside_the_model_is_advanced_by_calls_and_by_no_recording(advance, covariance):
    x, first = torch.rand(5, 6), advance()
    model = rvconvert.convert(Advancing(advance), covariance=covariance, example_inputs=x)
    assert [model(x)[1] for _ in range(3)] == [first + 1, first + 2, first + 3]
    assert model(torch.rand(4, 6))[1] == first + 4
    assert rvconvert.plan(Advancing(advance), example_inputs=x) and advance() == first + 5


@pytest.mark.parametrize("covariance", ["independent", "calibrated"])
def test_a_copy_knows_what_is_outside_the_model(covariance):
    model, x = rvconvert.convert(Advancing(_module), covariance=covariance, example_inputs=torch.rand(5, 6)), torch.rand(5, 6)
    (_, first), copied = model(x), copy.deepcopy(model)
    if covariance == "calibrated":
        rvconvert.calibrate(copied, x, pairs=2)
        with pytest.raises(RuntimeError):
            rvconvert.calibrate(copied, torch.rand(5, 7), pairs=2)
    assert copied(x)[1] == first + 1


def test_what_is_outside_a_model_that_makes_its_layers_is_advanced_by_calls():
    class Made(Advancing):
        def forward(self, x):
            if not hasattr(self, "last"):
                self.last = nn.Linear(6, 6)
            y, count = super().forward(x)
            return self.last(y), count

    x, first = torch.rand(5, 6), _module()
    model = rvconvert.convert(Made(_module), example_inputs=x)
    assert model(x)[1] == first + 1


@pytest.mark.parametrize("kept", [
    lambda tensor: {("train", 0): tensor}, lambda tensor: collections.deque([tensor]), lambda tensor: {0.5: tensor},
    lambda tensor: [[[[[tensor]]]]], lambda tensor: [torch.zeros(()) for _ in range(300)] + [tensor], lambda tensor: {tensor},
])  # fmt: skip
def test_a_tensor_is_advanced_in_whatever_a_model_keeps_it(kept):
    count = torch.zeros(())

    class Counting(VAE):
        def __init__(self):
            super().__init__()
            self.kept = kept(count)

        def forward(self, x):
            found = self.kept
            while not isinstance(found, torch.Tensor):
                found = list(found.values() if isinstance(found, dict) else found)[-1]
            found.add_(1)
            return self.reconstruct(x), found * 1

    model = rvconvert.convert(Counting(), inplace=True)
    assert [float(model(torch.rand(5, 6))[1]) for _ in range(4)] == [1, 2, 3, 4]


def test_layers_in_a_list_are_trained_and_written():
    class Taught(VAE):
        def __init__(self):
            super().__init__()
            self.teacher = [nn.Linear(6, 6), nn.BatchNorm1d(6)]

        def forward(self, x):
            with torch.no_grad():
                self.teacher[0].weight.mul_(0.5)
            return self.teacher[1](self.teacher[0](self.reconstruct(x)))

    torch.manual_seed(0)
    plain, x = Taught(), torch.rand(5, 6)
    take_variance(plain)
    found = []
    for model in (plain, rvconvert.convert(plain, example_inputs=x)):
        layer, norm = model.teacher
        for _ in range(3):
            layer.weight.grad = None
            model(x).square().sum().backward()
        found.append((layer.weight.detach().clone(), norm.running_mean.clone(), layer.weight.grad is None))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


RUNNING_LOSS = torch.zeros(())
WRITES = {
    "item": lambda r, loss: r.__setitem__(0, loss),
    "item +=": lambda r, loss: r.__setitem__(0, r[0].__iadd__(loss)),
    "view of an item": lambda r, loss: r[0].add_(loss),
    "slice": lambda r, loss: r[:1].add_(loss),
    "view": lambda r, loss: r.view(-1).add_(loss),
    "data": lambda r, loss: r.data.add_(loss),
    "part of data": lambda r, loss: r.data[1:].add_(loss),
    "detach": lambda r, loss: r.detach().add_(loss),
    "select": lambda r, loss: r.select(0, 1).add_(loss),
    "unbind": lambda r, loss: r.unbind(0)[1].add_(loss),
    "unsqueeze": lambda r, loss: r.unsqueeze(0).add_(loss),
    "data is set": lambda r, loss: setattr(r, "data", r.data + loss),
    "fill": lambda r, loss: r.fill_(loss),
    "out": lambda r, loss: torch.add(r, loss, out=r),
    "twice": lambda r, loss: r.add_(loss).mul_(0.5),
}
PAIR = torch.zeros(2)


@pytest.mark.parametrize("of", ["buffer", "attribute", "entry", "global"])
@pytest.mark.parametrize("name", WRITES)
def test_what_is_random_is_written_through_any_view(name, of):
    class Measuring(VAE):
        def __init__(self):
            super().__init__()
            self.register_buffer("buffer", torch.zeros(2))
            self.attribute, self.entries = torch.zeros(2), {"of": [torch.zeros(2)]}

        def kept(self):
            return {"buffer": self.buffer, "attribute": self.attribute, "entry": self.entries["of"][0], "global": PAIR}[of]

        def forward(self, x):
            y = self.reconstruct(x)
            with torch.no_grad():
                WRITES[name](self.kept(), ((y - x) ** 2).mean())
            return y

    plain, x = Measuring(), torch.rand(5, 6)
    take_variance(plain)
    found = []
    for model in (plain, rvconvert.convert(plain, example_inputs=x)):
        PAIR.zero_()
        for _ in range(3):
            model(x)
        found.append(model.kept().clone())
    torch.testing.assert_close(*found)
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize("covariance", ["independent", "calibrated", "sampled"])
def test_a_running_mean_outside_the_model_is_of_what_is_random(covariance):
    class Measuring(VAE):
        def forward(self, x):
            y = self.reconstruct(x)
            with torch.no_grad():
                RUNNING_LOSS.mul_(0.5).add_(((y - x) ** 2).mean())
            return y

    plain, x = Measuring(), torch.rand(5, 6)
    take_variance(plain)
    found = []
    for model in (plain, rvconvert.convert(plain, covariance=covariance, example_inputs=x)):
        RUNNING_LOSS.zero_()
        for _ in range(3):
            model(x)
        found.append(RUNNING_LOSS.clone())
    torch.testing.assert_close(*found)


def _divided(weights):
    weights /= 5
    return weights


def _one_more(weights):
    weights[0] += 1
    return weights


def _through_views(weights):
    weights.view(-1)[1:].mul_(3)
    weights.data.add_(1)
    return weights


MADE = {
    "a legacy tensor": lambda: torch.Tensor([0.5, 1.0]),
    "of NumPy": lambda: torch.from_numpy(np.array([0.5, 1.0], dtype=np.float32)),
    "a legacy tensor, moved": lambda: torch.Tensor([0.5, 1.0]).to("cpu"),
    "zeros": lambda: torch.zeros(2),
}
WRITTEN = {
    "by the loss": lambda weights, loss: weights.add_(loss),
    "by the loss, squared": lambda weights, loss: weights.add_(loss) ** 2,
    "by a number": lambda weights, loss: _divided(weights) * loss,
    "in part": lambda weights, loss: _one_more(weights) * loss,
    "by views": lambda weights, loss: _through_views(weights) * loss,
    "as a mask": lambda weights, loss: torch.BoolTensor([True, False]).logical_not_() * loss,
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("written", WRITTEN)
def test_a_tensor_that_no_torch_function_made_is_written_to_once(made, written):
    class Accumulating(VAE):
        def forward(self, x):
            y = self.reconstruct(x)
            return y, WRITTEN[written](MADE[made](), ((y - x) ** 2).mean()).sum()

    plain, x = Accumulating(), torch.rand(5, 6)
    take_variance(plain)
    rv = rvconvert.convert(plain)
    gradients = []
    for model in (plain, rv, rv, rv):
        _, loss = model(x)
        torch.testing.assert_close(loss, plain(x)[1])
        gradients.append(torch.autograd.grad(loss, model.decoder[0].weight)[0])
    for gradient in gradients:
        torch.testing.assert_close(gradient, gradients[0])


def _count(counted, name, module, args, out):
    counted[name] += 1


def test_a_hook_fires_once_a_call():
    model, seen = rvconvert.convert(VAE()), []
    model.encoder.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    counted = collections.Counter()
    model.encoder.register_forward_hook(functools.partial(_count, counted, "encoder"))
    for n in (5, 4, 5):
        model(torch.rand(n, 6))
    assert seen == [5, 4, 5] and counted == {"encoder": 3}


def test_a_model_that_is_recorded_at_each_call_says_why_once():
    class Logging(VAE):
        def forward(self, x):
            y = self.reconstruct(x)
            self.text = f"{F.mse_loss(y, x).item():.3f}"
            return y

    model, x = rvconvert.convert(Logging()), torch.rand(5, 6)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(60):
            model(x)
    said = [str(each.message) for each in found if "recorded anew at each call" in str(each.message)]
    assert len(said) == 1 and "test_python_state.py" in said[0]


def test_an_encoder_alone_beside_a_reconstruction_is_no_call_without_a_penalty():
    class Factor(VAE):
        def forward(self, x, no_dec=False):
            mu, logvar = self.encoder(x).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (logvar / 2).exp()
            return z if no_dec else (self.decoder(z), z)

    model, x = rvconvert.convert(Factor()), torch.rand(5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        model(x, no_dec=True)
