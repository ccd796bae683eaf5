"""What a refusal says to type next works when it is pasted, for this very model; the same line stands once."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rvconvert
from rvconvert.errors import ConversionError, NoReparameterizationError, TracingError, UnsupportedOperationError
from rvconvert.rules.kinds import value_error


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 6)
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))

    def posterior(self, x):
        mu, logvar = self.encoder(x).chunk(2, -1)
        return mu, torch.exp(0.5 * logvar)

    def latent(self, x):
        mu, std = self.posterior(x)
        return mu + std * torch.randn_like(mu)


class Gradient(Base):
    def forward(self, x):
        z = self.latent(x)
        (slope,) = torch.autograd.grad(self.decoder(z).square().sum(), z, create_graph=True)
        return self.decoder(z - 0.1 * slope)


class Sampled(Base):
    def forward(self, x):
        return self.decoder(self.latent(x))


@pytest.mark.parametrize("options", [{}, {"covariance": "calibrated"}, {"attach": False, "output": "distribution"}])
def test_transforms_of_torch_func(options):
    torch.manual_seed(0)
    vae, x = Sampled(), torch.rand(8, 4)

    def gradients(**options):
        rv = rvconvert.convert(vae, **options)
        rv(x)

        def loss(parameters, x):
            y = torch.func.functional_call(rv, parameters, (x,))
            return (y.mean if isinstance(y, rvconvert.RandomVariable) else y).square().mean() + rvconvert.variance_penalty(y)

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="same")(
            {name: p.detach() for name, p in rv.named_parameters()}, x[:, None]
        )

    with pytest.raises(ConversionError) as refusal:
        gradients(**options)
    advice = re.search(r"convert with (.*), and add rvconvert.variance_penalty\(y\)", str(refusal.value))[1]
    found = gradients(**eval(f"dict({advice})"))
    assert all(gradient.shape[0] == len(x) and gradient.any() for gradient in found.values())


class Elsewhere(Base):
    def forward(self, x):
        return self.decoder(self.posterior(x)[0])

    def reconstruct(self, x):
        return self.decoder(self.latent(x))


class Bare(Base):
    def forward(self, x):
        return self.decoder(self.encoder(x)[:, :3])


class Cauchy(Base):
    def forward(self, x):
        loc, scale = self.posterior(x)
        return self.decoder(torch.distributions.Cauchy(loc, scale).rsample())


class StudentT(Base):
    def forward(self, x):
        loc, scale = self.posterior(x)
        return self.decoder(torch.distributions.StudentT(5, loc, scale).rsample())


class Index(Base):
    def forward(self, x):
        index = torch.multinomial(self.posterior(x)[0].softmax(-1), 1)[:, 0]
        return self.decoder(torch.eye(3)[index])


class OneHot(Base):
    def forward(self, x):
        logits = self.posterior(x)[0]
        return self.decoder(F.gumbel_softmax(logits, hard=True))


class Loop(Base):
    def forward(self, x):
        z = self.latent(x)
        for _ in range(29):
            z = torch.special.bessel_j0(z)
        return self.decoder(z)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def refused(model, **options):
    with pytest.raises(rvconvert.ConversionError) as caught:
        rvconvert.convert(model, example_inputs=X, **options)
    return str(caught.value)


def pasted(model, message):
    """The results of every line of advice, run as it stands."""
    lines = re.findall(r"^ +(rvconvert\.convert\(.*)$", message, re.MULTILINE)
    assert lines, message
    return [eval(line, {"rvconvert": rvconvert, "model": model}) for line in lines]


@pytest.mark.parametrize("case", [Gradient, Elsewhere, Bare])
def test_every_line_of_advice_works_when_pasted(case):
    model = case()
    for converted in pasted(model, refused(model)):
        name = converted._rvconvert.options.methods[0]
        of_decoder = converted._rvconvert.options.random_inputs
        given = rvconvert.RandomVariable(torch.zeros(5, 3), torch.ones(5, 3)) if of_decoder else X
        try:
            out = getattr(converted, name)(given)
        except rvconvert.ConversionError as error:
            assert name in ("posterior",), error  # a method may be named that decodes nothing; it is refused in turn
            continue
        out = out if isinstance(out, torch.Tensor) else out[0]
        out.square().mean().backward()
        assert any(p.grad is not None for p in converted.parameters())
        assert name in ("latent", "posterior") or converted.last_penalty > 0


@pytest.mark.parametrize(("case", "advice", "mended"), [(Cauchy, "StudentT(5", StudentT), (Index, "gumbel_softmax", OneHot)])
def test_the_law_that_is_named_instead_converts(case, advice, mended):
    assert advice in refused(case())
    out = rvconvert.convert(mended(), example_inputs=X)
    out(X).sum().backward()
    assert out.last_penalty > 0


def test_a_line_that_a_loop_comes_by_is_named_once():
    message = refused(Loop(), strict=True)
    assert message.count("bessel_j0(z)") == 1
    assert message.count("@rvconvert.rule(torch.special.bessel_j0)") == 1
    stub = "\n".join(line[5:] for line in message.split("write:\n")[1].splitlines())
    overlay = rvconvert.REGISTRY.overlay()
    stub = stub.replace("(torch.special.bessel_j0)", "(torch.special.bessel_j0, registry=overlay)")
    exec(stub, {"rvconvert": rvconvert, "torch": torch, "overlay": overlay})
    rvconvert.convert(Loop(), example_inputs=X, strict=True, rules=overlay)(X).sum().backward()


class Written(nn.Module):
    """``write(y, x)`` changes what the decoder gives, in place."""

    def __init__(self, write):
        super().__init__()
        self.encoder, self.decoder, self.write = nn.Linear(8, 6), nn.Linear(3, 8), write

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        y = self.decoder(mu + (logvar / 2).exp() * torch.randn_like(mu))
        self.write(y, x)
        return y * 2


@pytest.mark.parametrize("way", ["y[y < 0] *= -1", "y[y < 0] = -y[y < 0]", "y[y[:, 0] > 0] = 0"])
def test_elements_that_a_random_mask_picks_are_refused_with_what_to_type(way):
    with pytest.raises(UnsupportedOperationError, match=r"torch\.where"):
        rvconvert.convert(Written(lambda y, x: exec(way, {"y": y})))(torch.rand(4, 8))


def test_a_write_through_a_view_of_another_kind_is_refused_at_its_own_line():
    def write(y, x):
        y.t()[0] += 1

    with pytest.raises(TracingError, match=r"(?s)y\.t\(\)\[0\] \+= 1.*y \* 2.*torch\.where"):
        rvconvert.convert(Written(write))(torch.rand(4, 8))


def test_a_model_without_forward_is_told_of_its_methods():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(8, 6), nn.Linear(3, 8)

        def reconstruct(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            return self.decoder(mu + (logvar / 2).exp() * torch.randn_like(mu))

    with pytest.raises(ConversionError, match=r"no method 'forward'.*reconstruct.*methods="):
        rvconvert.convert(Named())
    rvconvert.convert(Named(), methods=("reconstruct",), example_inputs=torch.rand(4, 8))


class _LossThatDraws(nn.Module):
    """Its forward decodes the mean; a loss draws."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(10, 8), nn.Linear(4, 10)

    def set_mode(self, flag):
        self.flag = flag

    def encode(self, x):
        return self.encoder(x).chunk(2, 1)

    def reparameterize(self, mu, logvar):
        return mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)

    def forward(self, x):
        return self.decoder(self.encode(x)[0])

    def elbo_loss(self, x):
        mu, logvar = self.encode(x)
        return (self.decoder(self.reparameterize(mu, logvar)) - x).square().mean()


def test_a_static_method_is_not_offered_and_told_to_be_left_out():
    class Static(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        @staticmethod
        def divergence(mean):
            return mean.square().sum()

        def forward(self, x):
            return self.layer(x), self.divergence(x)

    with pytest.raises(ConversionError) as refused:
        rvconvert.convert(Static(), example_inputs=torch.rand(2, 4))
    assert "divergence" not in str(refused.value)
    with pytest.raises(ConversionError, match=r"Static.divergence is a staticmethod.*leave it out"):
        rvconvert.convert(Static(), methods=("forward", "divergence"))


def test_of_other_methods_those_that_draw_are_named_the_one_that_goes_on_first():
    with pytest.raises(rvconvert.ConversionError) as refused:
        rvconvert.convert(_LossThatDraws())(torch.randn(3, 10))
    named = re.findall(r"methods=\('(\w+)',\)", str(refused.value))
    assert named == ["elbo_loss", "reparameterize"]
    rv = rvconvert.convert(_LossThatDraws(), methods=(named[0],))
    rv.elbo_loss(torch.randn(3, 10)).backward()
    assert rv.last_penalty > 0


class _OfStrings(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.encoder, self.decoder = nn.EmbeddingBag(26, 6), nn.Linear(6, 6), nn.Linear(3, 26)

    def rsample(self, h):
        mu, logvar = self.encoder(h).chunk(2, 1)
        return mu + torch.randn_like(mu) * (logvar / 2).exp()

    def forward(self, words):
        h = torch.cat([self.embedding(torch.tensor([[ord(letter) - ord("a") for letter in word]])) for word in words])
        return self.decoder(self.rsample(h))


def test_a_method_that_the_refused_one_calls_is_not_offered():
    """It would be converted by itself, and give a latent's mean to a decoder without L_c."""
    with pytest.raises(rvconvert.ConversionError) as refused:
        rvconvert.convert(_OfStrings())(["chair", "lamp"])
    assert "methods=" not in str(refused.value)
    latent = re.search(r"latent=\('([^']+)',\)", str(refused.value))
    rv = rvconvert.convert(_OfStrings(), latent=(latent[1],))
    rv(["chair", "lamp"])
    assert rv.last_penalty > 0


def test_a_compiled_model_is_told_to_be_converted_first():
    with pytest.raises(rvconvert.ConversionError, match=r"torch\.compile\(rvconvert\.convert\(model\)\)"):
        rvconvert.convert(torch.compile(_LossThatDraws(), backend="eager"))


def test_a_solver_that_chooses_its_steps_is_told_of_those_that_do_not():
    assert "method='rk4'" in str(value_error("V.forward: torchdiffeq/_impl/misc.py:60: if d0 < 1e-5:"))
    assert "torch.where" in str(value_error("V.forward: model.py:60: if d0 < 1e-5:"))


class _Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(10, 8)

    def forward(self, x):
        mu, logvar = self.layer(x).chunk(2, 1)
        return mu, logvar, mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)


class _ScalingDecoder(nn.Sequential):
    """Writes into its argument, as latents of a scale of their own are scaled back."""

    def forward(self, z):
        z /= 0.5
        return super().forward(z)


def test_an_encoder_with_a_decoder_apart_is_told_what_to_type():
    encoder = rvconvert.convert(_Encoder())
    with pytest.warns(UserWarning, match=r"output='distribution'.*random_inputs") as said:
        nn.Linear(4, 10)(encoder(torch.randn(3, 10))[2]).sum().backward()
    assert len([each for each in said if each.category is UserWarning]) == 1
    encoder = rvconvert.convert(_Encoder(), output="distribution")
    decoder = rvconvert.convert(_ScalingDecoder(nn.Linear(4, 10)), random_inputs=("z",))
    decoder(encoder(torch.randn(3, 10))[2]).sum().backward()
    assert decoder.last_penalty > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a prior's samples beside a reconstruction attach nothing, as is right
        decoder(nn.Linear(10, 4)(torch.randn(3, 10)))  # the plain decoder takes it, and writes into it


class _OnALattice(Base):
    """Coordinates and a latent side by side; half of the lattice, told by its coordinates, is mirrored."""

    def forward(self, x, mirrors=True):
        mu, std = self.posterior(x)
        z = mu + std * torch.randn_like(mu)
        at = torch.linspace(-1, 1, 6)[None, :, None].expand(len(x), 6, 1)
        lattice = torch.cat((at, z[:, None, 1:].expand(-1, 6, 2)), -1)
        mask = lattice[..., 0] > 0 if mirrors else at[..., 0] > 0
        lattice = lattice.clone()
        lattice[..., 0:1][mask] *= -1
        y = self.decoder(lattice)
        y[..., 1][mask] *= -1
        return y, lattice[mask]


@pytest.mark.parametrize("covariance", ["independent", "calibrated", "lowrank", "sampled"])
def test_a_mask_of_the_part_that_does_not_vary_picks(covariance):
    torch.manual_seed(0)
    rv = rvconvert.convert(_OnALattice(), covariance=covariance, output="distribution")
    x, found = torch.rand(5, 4), []
    for mirrors in (True, False):
        torch.manual_seed(1)
        found.append(rv(x, mirrors))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.mean, b.mean)
        torch.testing.assert_close(a.var, b.var)


TRANSFORMS = {
    "a loss of each example": lambda m, z, x: torch.vmap(lambda a, b: (a - b).square().mean())(m.decoder(z), x).mean(),
    "a decoder": lambda m, z, x: torch.vmap(m.decoder)(z),
    "an ensemble": lambda m, z, x: torch.vmap(lambda scale: m.decoder(z) * scale)(torch.rand(3, 1)).mean(0),
    "a Jacobian": lambda m, z, x: (m.decoder(z), torch.vmap(torch.func.jacrev(m.decoder))(z.detach())),
}


@pytest.mark.parametrize("mode", ["independent", "sampled"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_torch_func_inside_is_refused_with_its_line(name, mode):
    class Transforming(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            return TRANSFORMS[name](self, mu + torch.randn_like(mu) * (0.5 * logvar).exp(), x)

    with pytest.raises(TracingError, match=r"(?s)torch\.vmap and.*test_refusals\.py:\d+:.*Write it for the whole batch"):
        rvconvert.convert(Transforming(), covariance=mode)(torch.rand(5, 6))


def reparameterized(mu, logvar):
    return mu + torch.randn_like(mu) * (0.5 * logvar).exp()


class Reparameterization(nn.Module):
    def forward(self, mu, logvar):
        return reparameterized(mu, logvar)


class WarmedUp(nn.Module):
    """Decodes the mean while a flag or a count of epochs says so."""

    def __init__(self, draws):
        super().__init__()
        self.encoder, self.decoder, self.warm, self.epoch = nn.Linear(6, 4), nn.Linear(2, 6), False, 2
        self.layer, self.draws = nn.ModuleList([nn.Sequential(), Reparameterization()]), draws

    def draw(self, mu, logvar):
        return mu + torch.randn_like(mu) * (0.5 * logvar).exp()

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        if self.warm or self.epoch < 2:
            return self.decoder(mu)
        if self.draws == "method":
            return self.decoder(self.draw(mu, logvar))
        return self.decoder(self.layer[1](mu, logvar) if self.draws == "layer" else reparameterized(mu, logvar))


class NeverDraws(WarmedUp):
    """An autoencoder beside a prior's samples; an argument says whether the posterior's are drawn."""

    def forward(self, x, sample_posterior=False):
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.decoder(self.draw(mu, logvar) if sample_posterior else mu)


def test_a_model_that_an_argument_keeps_from_drawing_is_refused():
    with pytest.raises(NoReparameterizationError, match="nothing to convert"):
        rvconvert.convert(NeverDraws("method"))(torch.rand(3, 6))


@pytest.mark.parametrize("draws", ["method", "function", "layer"])
@pytest.mark.parametrize(("attribute", "now", "later"), [("warm", True, False), ("epoch", 0, 2)])
def test_a_model_that_samples_later_is_served(attribute, now, later, draws):
    rv, x = rvconvert.convert(WarmedUp(draws)), torch.rand(3, 6)
    setattr(rv, attribute, now)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.testing.assert_close(rv(x), rv.decoder(rv.encoder(x).chunk(2, 1)[0]))
    assert getattr(rv, attribute) == now and any("attaches no variance penalty" in str(each.message) for each in said)
    setattr(rv, attribute, later)
    rv(x)
    assert rv.last_penalty > 0


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.dec = nn.Linear(2, 6)

    def forward(self, z):
        return self.dec(z)


def test_a_bare_decoder_is_told_how_to_convert_it():
    with pytest.raises(ConversionError) as refused:
        rvconvert.convert(Decoder())(torch.rand(3, 2))
    assert "rvconvert.convert(model, random_inputs=('z',))" in str(refused.value)


class TimeFirst(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.encoder, self.decoder, self.result = nn.Linear(2, 6), nn.Linear(3, 2), result

    def forward(self, x):
        mu, logvar = self.encoder(x.mean(0)).chunk(2, -1)
        steps = (self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp()) for _ in range(len(x)))
        return self.result(steps, x)


def test_a_generator_is_no_result():
    with pytest.raises(TracingError, match=r"TimeFirst\.forward gives a generator.*give a list"):
        rvconvert.convert(TimeFirst(lambda steps, x: steps))(torch.rand(4, 5, 2))


def test_a_run_on_half_a_batch_warns_of_nothing():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rvconvert.convert(TimeFirst(lambda steps, x: F.mse_loss(torch.stack(list(steps)), x)))(torch.rand(4, 5, 2))
    assert not [each for each in said if "target size" in str(each.message)]
