"""Random decoders: a seed becomes the source of a ``forward``, its modules, and the law that each line obeys.

The source is real Python, so that both lifetimes meet what a person writes. The laws are the reference's alone: they
say which mathematics stands behind a line, and name no rule of the library.
"""

from __future__ import annotations

import linecache
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Law", "Part", "Program", "Step", "call", "generate", "source", "with_forward"]

SCOPE = {"torch": torch, "F": F, "nn": nn}
LARGEST = 96  # elements of a sample


@dataclass(frozen=True)
class Law:
    """The mathematics of one part of a step.

    Attributes:
        kind: the name of the reference's law.
        breaks: of an elementwise function: expressions of its inputs whose roots are where it jumps or bends.
        several: of an elementwise function of independent variables: what it is (``sum``, ``product``, ...).
        partial: the function is not defined on the whole line.
        options: what else the law needs.
    """

    kind: str
    breaks: tuple[str, ...] = ()
    several: str = ""
    partial: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def smooth(self) -> bool:
        """True where the delta method is right in the limit of small variance, away from the breaks."""
        return self.kind not in ("dropout", "alpha_dropout", "sampled", "laws", "cast")


@dataclass(frozen=True)
class Part:
    """``out = expression`` of ``inputs``, names of values or of earlier parts."""

    out: str
    expression: str
    inputs: tuple[str, ...]
    law: Law


@dataclass(frozen=True)
class Step:
    """A line of the decoder, and the parts that the reference takes it apart into."""

    line: str
    out: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Program:
    """A decoder as source and modules.

    Attributes:
        seed: makes it again.
        steps: lines in order; ``outputs``: what forward returns, every value that no later line overwrites.
        model: the decoder, in the dtype and mode under test.
        shape: of the latent, the batch included.
        refused: why conversion must refuse it, if it must.
    """

    seed: int
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    model: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype
    refused: str = ""

    def __str__(self) -> str:
        mode = "training" if self.model.training else "eval"
        modules = [f"    # self.{name} = {module}" for name, module in self.model.named_children()]
        constants = [f"    # self.{name}: {tuple(c.shape)}" for name, c in self.model._buffers.items() if c is not None]
        head = f"# seed {self.seed}: latent {self.shape}, {self.dtype}, {mode}"
        return "\n".join([head, *modules, *constants, source(self.steps, self.outputs)])

    def moments(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latent; about one element in ten does not vary."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        mean = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        var = 0.02 + 0.8 * torch.rand(self.shape, generator=generator, dtype=torch.float64)
        var = torch.where(torch.rand(self.shape, generator=generator) < 0.1, 0.0, var)
        return mean.to(self.dtype), (scale * var).to(self.dtype)


def source(steps: tuple[Step, ...], outputs: tuple[str, ...], before: str = "pass", after: str = "") -> str:
    """The forward method's own text, a line before it; ``after`` each may follow another, with ``{}`` for its value."""
    lines = [f"    {step.line}" + after.replace("{}", step.out) for step in steps]
    return "\n".join(["def forward(self, v0):", f"    {before}", *lines, f"    return {', '.join(outputs)},"])


def with_forward(model: nn.Module, text: str, seed: int) -> nn.Module:
    """``model`` as an instance of a class of its own with this ``forward``."""
    name = f"<fuzz {seed}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    scope = dict(SCOPE)
    exec(compile(text, name, "exec"), scope)
    model.__class__ = type("Decoder", (nn.Module,), {"forward": scope["forward"]})
    return model


def call(expression: str, names: tuple[str, ...], model: nn.Module) -> Callable[..., Any]:
    """``expression`` as a function of the values called ``names``."""
    made = eval(f"lambda self, {', '.join(names)}: {expression}", dict(SCOPE))
    return lambda *values: made(model, *values)


# --- elementwise functions of one value: "!" marks a spelling that overwrites its argument -------------------------


@dataclass(frozen=True)
class Unary:
    spellings: tuple[str, ...]
    modules: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()


def unary(text: str, modules: str = "", breaks: str = "") -> Unary:
    return Unary(tuple(text.split(" | ")), tuple(filter(None, modules.split(" | "))), tuple(filter(None, breaks.split(" | "))))


UNARY = [
    unary(
        "F.relu(x) | torch.relu(x) | x.relu() | x.clamp(min=0) | !x.relu_() | !F.relu(x, inplace=True) | !torch.relu_(x)",
        "nn.ReLU() | !nn.ReLU(inplace=True)",
        "x",
    ),
    unary(
        "F.leaky_relu(x, 0.2) | !F.leaky_relu_(x, 0.2) | !F.leaky_relu(x, 0.2, True)",
        "nn.LeakyReLU(0.2) | !nn.LeakyReLU(0.2, inplace=True)",
        "x",
    ),
    unary("F.relu6(x)", "nn.ReLU6() | !nn.ReLU6(True)", "x | x - 6"),
    unary(
        "F.hardtanh(x) | !F.hardtanh_(x) | torch.clamp(x, -1.0, 1.0) | x.clip(-1, 1) | !x.clamp_(-1.0, 1.0)",
        "nn.Hardtanh()",
        "x + 1 | x - 1",
    ),
    unary("F.hardsigmoid(x)", "nn.Hardsigmoid()", "x + 3 | x - 3"),
    unary("F.hardswish(x)", "nn.Hardswish()", "x + 3 | x - 3"),
    unary("F.hardshrink(x)", "nn.Hardshrink(0.5)", "x - 0.5 | x + 0.5"),
    unary("F.softshrink(x, 0.3)", "nn.Softshrink(0.3)", "x - 0.3 | x + 0.3"),
    unary("F.threshold(x, 0.1, -0.4)", "nn.Threshold(0.1, -0.4)", "x - 0.1"),
    unary("F.elu(x) | !F.elu_(x)", "nn.ELU() | !nn.ELU(inplace=True)", "x"),
    unary("F.elu(x, 0.5)", "nn.ELU(0.5)", "x"),
    unary("F.selu(x) | !torch.selu_(x)", "nn.SELU()", "x"),
    unary("F.celu(x, 0.5)", "nn.CELU(0.5)", "x"),
    unary("F.gelu(x)", "nn.GELU()"),
    unary("F.gelu(x, approximate='tanh')", "nn.GELU('tanh')"),
    unary("F.silu(x) | !F.silu(x, inplace=True)", "nn.SiLU() | !nn.SiLU(inplace=True)"),
    unary("torch.tanh(x) | x.tanh() | !x.tanh_() | F.tanh(x)", "nn.Tanh()"),
    unary("torch.sigmoid(x) | x.sigmoid() | !x.sigmoid_() | torch.special.expit(x)", "nn.Sigmoid()"),
    unary("F.softplus(x)", "nn.Softplus()"),
    unary("F.softplus(x, 2.0, 10.0)", "nn.Softplus(2.0, 10.0)"),
    unary("F.mish(x)", "nn.Mish() | !nn.Mish(inplace=True)"),
    unary("F.softsign(x)", "nn.Softsign()", "x"),
    unary("F.logsigmoid(x)", "nn.LogSigmoid()"),
    unary("F.tanhshrink(x)", "nn.Tanhshrink()"),
    unary("x.abs() | torch.abs(x) | abs(x) | !x.abs_()", "", "x"),
    unary("torch.exp(0.4 * x)"),
    unary("torch.expm1(0.4 * x)"),
    unary("x ** 2 | x.square() | torch.pow(x, 2) | x * x | torch.square(x)"),
    unary("0.1 * x ** 3"),
    unary("torch.sin(x) | x.sin() | !x.sin_()"),
    unary("torch.cos(x)"),
    unary("torch.erf(x)"),
    unary("torch.atan(x)"),
    unary("torch.asinh(x)"),
    unary("torch.sinh(0.3 * x)"),
    unary("torch.cosh(0.3 * x)"),
    unary("torch.special.ndtr(x)"),
    unary("torch.sign(x)", "", "x"),
    unary("torch.maximum(x, torch.zeros_like(x)) | torch.max(x, x.new_zeros(()))", "", "x"),
    unary("F.prelu(x, x.new_full((1,), 0.3))", "nn.PReLU(init=0.3)", "x"),
    unary("torch.exp2(0.4 * x)"),
    unary("torch.sinc(x)"),
    unary("torch.where(x > 0.3, x, 0.1 * x)", "", "x - 0.3"),
    unary("torch.where(x > 0, x, 0.5 * (torch.exp(x) - 1))", "", "x"),
    unary("x * torch.sigmoid(x) | torch.sigmoid(x) * x | x.mul(x.sigmoid())"),
    unary("0.5 * x * (1 + torch.erf(x / 2 ** 0.5))"),
    unary("x * F.softplus(x).tanh()"),
    unary("x - x | torch.sub(x, x)"),
    unary("x + x | torch.add(x, x)"),
    unary("torch.sin(x) ** 2 + torch.cos(x) ** 2"),
    unary("x / (1 + x.abs())", "", "x"),
    unary("torch.maximum(x, 0.2 * x)", "", "x"),
    unary("x.clamp(-1, 1) - x", "", "x - 1 | x + 1"),
    unary("x * (x > 0)", "", "x"),
    unary("x + torch.relu(-x)", "", "x"),
]
AFFINE = [
    "-x", "2.0 - x", "x * 1.7", "0.5 * x + 1.0", "x / 2.5", "!x.mul_(0.8)", "!x.add_(0.7)", "!x.neg_()", "torch.neg(x)",
    "torch.sub(1.5, x, alpha=0.5)", "torch.add(x, 1.0, alpha=0.3)", "torch.rsub(x, 1.0)", "x.div(1.5)", "!x.div_(1.5)",
    "torch.deg2rad(30 * x)",
]  # fmt: skip
# Of a positive value. (Each is one operation: the lognormal law is that of the operation's own input.)
LOGNORMAL = ["torch.log(x)", "torch.sqrt(x)", "torch.rsqrt(x)", "1.0 / x", "torch.reciprocal(x)", "torch.log1p(x)",
             "torch.log2(x)", "x ** 0.5", "x.log()", "x.sqrt()", "torch.log10(x)"]  # fmt: skip
POSITIVE = ["x.square() + 1.5", "torch.exp(0.3 * x) + 0.7", "F.softplus(x) + 1.0", "torch.sigmoid(x) + 0.8"]

# --- linear maps, by rank ------------------------------------------------------------------------------------------

LINEAR_FUNCTIONS: dict[int, list[str]] = {
    2: ["x.flip(1)", "torch.cumsum(x, 1)", "torch.roll(x, 1, 1)", "x.unsqueeze(1)", "x[:, 1:]", "x[..., ::2]", "x[:, None]",
        "F.pad(x, (1, 2))", "torch.cat([x, x], 1)", "x.repeat(1, 2)", "torch.hstack([x, 2 * x])",
        "x.unsqueeze(2).expand(-1, -1, 2)",
        "x.sum(1, keepdim=True)", "x.mean(1, keepdim=True)", "torch.diff(x)", "x.narrow(1, 0, 2)", "x.view(x.shape[0], 1, -1)",
        "torch.stack([x, -x], 1)", "x.repeat_interleave(2, 1)", "torch.einsum('bi,i->bi', x, self.v)", "x @ self.w",
        "torch.matmul(x, self.w)", "F.linear(x, self.w.t())", "torch.einsum('bi,ij->bj', x, self.w)", "x * self.v",
        "x + self.v",
        "torch.addmm(self.v, x, self.w)", "torch.index_select(x, 1, torch.tensor([1, 0, 1]))",
        "x.masked_fill(self.v > 0.5, 0.35)", "torch.where(self.v > 0, x, 0.2 * x)",
        "torch.where(self.v > 0, x, x.new_zeros(()))",
        "torch.tensordot(x, self.w, dims=1)", "x.clone()", "x.contiguous()", "torch.lerp(x, self.v, 0.3)",
        "torch.gather(x, 1, torch.tensor([[1, 0, 1]]).expand(x.shape[0], 3))", "torch.zeros_like(x).add(x)"],
    3: ["x.transpose(1, 2)", "x.permute(0, 2, 1)", "x.mT", "x.flatten(1)", "x.mean(-1)", "x.sum(1)", "x.mean((1, 2))",
        "torch.cumsum(x, -1)", "F.pad(x, (1, 1), mode='circular')", "F.pad(x, (1, 2), mode='replicate')",
        "F.pad(x, (2, 1), value=0.45)",
        "F.interpolate(x, scale_factor=2)", "F.interpolate(x, size=5, mode='linear')", "F.avg_pool1d(x, 2)", "x[:, :, ::2]",
        "F.interpolate(x, size=7, mode='linear', align_corners=True)", "F.adaptive_avg_pool1d(x, 3)", "x.unsqueeze(-1)",
        "x.flip(2)",
        "F.avg_pool1d(x, 3, 1, 1)", "F.avg_pool1d(x, 2, 2, 1, count_include_pad=False)", "x[:, 0]", "x[:, -1:]",
        "x.reshape(x.size(0), -1)",
        "torch.cat([x, x.flip(1)], 1)", "torch.chunk(x, 2, 1)[1]", "x.split(1, 1)[0]", "x.unbind(1)[0]", "x.repeat(1, 1, 2)",
        "torch.einsum('bcl->blc', x)", "torch.roll(x, (1,), (2,))", "x + self.v[:, None]", "x * self.v[:, None]",
        "x.movedim(1, 2)",
        "x.unfold(2, 2, 1).flatten(2)", "F.channel_shuffle(x, 2)", "x.diagonal(0, 1, 2)",
        "torch.einsum('bcl,cd->bdl', x, self.w)",
        "self.w.t() @ x", "torch.matmul(self.w.t(), x)", "x.contiguous().view(x.shape[0], -1)",
        "torch.stack([x, x.roll(1, 2)], 1)"],
    4: ["x.flatten(1)", "x.flatten(2)", "x.mean((2, 3))", "x.mean((2, 3), keepdim=True)", "x.sum(1, keepdim=True)",
        "F.interpolate(x, scale_factor=2)", "F.interpolate(x, scale_factor=2, mode='bilinear')",
        "F.interpolate(x, size=(3, 5), mode='bilinear')",
        "F.interpolate(x, size=(4, 3), mode='bicubic')", "F.interpolate(x, size=(4, 3), mode='bilinear', align_corners=True)",
        "F.interpolate(x, size=(2, 1), mode='area')", "F.interpolate(x, scale_factor=(1.7, 1.3), mode='nearest-exact')",
        "F.interpolate(x, scale_factor=1.5, mode='bilinear')", "F.interpolate(x, size=(1, 2), mode='bilinear', antialias=True)",
        "F.avg_pool2d(x, 2)", "F.avg_pool2d(x, 3, 2, 1)", "F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)",
        "F.adaptive_avg_pool2d(x, 1)",
        "F.avg_pool2d(x, 2, 2, 1, divisor_override=3)", "F.adaptive_avg_pool2d(x, (2, None))", "F.pixel_shuffle(x, 2)",
        "F.pixel_unshuffle(x, 2)", "F.pad(x, (1, 1, 1, 1), mode='reflect')", "F.pad(x, (1, 0, 0, 1))", "x.permute(0, 2, 3, 1)",
        "x.permute(0, 3, 1, 2)", "x.transpose(2, 3)", "x[:, :1]", "x[:, :, 1:, :1]", "x[..., 0]", "x.flip(-1)",
        "torch.rot90(x, 1, (2, 3))",
        "F.unfold(x, 2)", "x.contiguous(memory_format=torch.channels_last)", "torch.cat((x, x[:, :1]), dim=1)",
        "F.channel_shuffle(x, 2)",
        "x + self.v[:, None, None]", "x * self.v.view(1, -1, 1, 1)", "torch.einsum('bchw,cd->bdhw', x, self.w)",
        "x.reshape(x.shape[0], -1, 2)",
        "x.repeat(1, 1, 2, 1)", "torch.roll(x, (1, 1), (2, 3))", "x.expand(-1, -1, -1, -1).contiguous()", "x.unsqueeze(2)",
        "x.squeeze(1)"],
    5: ["x.flatten(1)", "x.mean((2, 3, 4))", "F.avg_pool3d(x, (1, 2, 1))", "F.interpolate(x, scale_factor=2)",
        "x.squeeze(2)", "x[:, :, 0]",
        "F.interpolate(x, size=(1, 2, 3), mode='trilinear')", "x.flatten(1, 2)", "x.permute(0, 1, 3, 4, 2)",
        "F.adaptive_avg_pool3d(x, 1)"],
}  # fmt: skip
LINEAR_MODULES: dict[int, list[str]] = {
    2: ["nn.Linear({c}, {n})", "nn.Linear({c}, {c})", "nn.Linear({c}, {n}, bias=False)", "nn.Unflatten(1, (2, -1))",
        "nn.Unflatten(1, (2, 2, -1))",
        "nn.Unflatten(1, (4, 1, -1))"],
    3: ["nn.Conv1d({c}, {n}, 3, padding=1)", "nn.Conv1d({c}, {n}, 2, 2)", "nn.ConvTranspose1d({c}, {n}, 3, 2, 1, 1)",
        "nn.Linear({l}, {n})",
        "nn.Conv1d({c}, {n}, 3, padding=2, dilation=2)", "nn.Conv1d({c}, {c}, 3, padding='same', groups={c})", "nn.Flatten()",
        "nn.Upsample(scale_factor=2)", "nn.Upsample(scale_factor=2, mode='linear')", "nn.AvgPool1d(2)",
        "nn.AdaptiveAvgPool1d(2)"],
    4: ["nn.Conv2d({c}, {n}, 3, padding=1)", "nn.Conv2d({c}, {n}, 1)", "nn.Conv2d({c}, {n}, 2, 2)",
        "nn.ConvTranspose2d({c}, {n}, 3, 2, 1, 1)",
        "nn.ConvTranspose2d({c}, {n}, 4, 2, 1)", "nn.Conv2d({c}, {c}, 3, padding=1, groups={c}, bias=False)", "nn.Flatten()",
        "nn.Flatten(2)",
        "nn.Upsample(scale_factor=2)", "nn.Upsample(scale_factor=2, mode='bilinear')", "nn.AvgPool2d(2)", "nn.PixelShuffle(2)",
        "nn.AdaptiveAvgPool2d((1, 2))", "nn.Linear({l}, {n})", "nn.UpsamplingNearest2d(scale_factor=2)", "nn.ZeroPad2d(1)",
        "nn.UpsamplingBilinear2d(scale_factor=2)"],
    5: ["nn.Conv3d({c}, {n}, (1, 2, 2), padding=(0, 1, 0))", "nn.ConvTranspose3d({c}, {n}, 2, 2)", "nn.Flatten()"],
}  # fmt: skip
NOT_COPIES = re.compile(r"view|\[|transpose|permute|mT|flatten|unsqueeze|expand|narrow|chunk|split|unbind|diagonal|movedim|"
                        r"squeeze|contiguous|unfold|reshape|Flatten|Unflatten|Identity|einsum|clone")  # fmt: skip
KEEPS_PLACES = re.compile(r"^x [*+] |self\.\w+ > |lerp|zeros_like|^x\.clone\(\)$|^x\.contiguous\([^)]*\)$")
NORMS: dict[int, list[str]] = {
    2: ["nn.BatchNorm1d({c})", "nn.BatchNorm1d({c}, affine=False)", "nn.LayerNorm({c})", "nn.RMSNorm({c})",
        "F.layer_norm(x, (x.shape[1],))",
        "nn.BatchNorm1d({c}, track_running_stats=False)", "F.normalize(x, dim=1)"],
    3: ["nn.BatchNorm1d({c})", "nn.LayerNorm({l})", "nn.LayerNorm(({c}, {l}))", "nn.GroupNorm(1, {c})", "nn.GroupNorm(2, {c})",
        "nn.InstanceNorm1d({c})", "nn.InstanceNorm1d({c}, affine=True)", "nn.RMSNorm({l})"],
    4: ["nn.BatchNorm2d({c})", "nn.BatchNorm2d({c}, momentum=0.5)", "nn.GroupNorm(1, {c})", "nn.GroupNorm(2, {c})",
        "F.instance_norm(x)",
        "nn.InstanceNorm2d({c}, affine=True)", "nn.LayerNorm({l})", "F.group_norm(x, 1)"],
    5: ["nn.BatchNorm3d({c})", "nn.GroupNorm(1, {c})"],
}  # fmt: skip
BINARY = {
    "sum": (["a + b", "torch.add(a, b)", "a.add(b)", "!a.add_(b)", "!+=", "torch.add(a, b, alpha=0.5)", "a - b",
        "torch.sub(a, b, alpha=2)",
             "torch.lerp(a, b, 0.3)", "!-=", "torch.rsub(a, b)"], ()),
    "product": (["a * b", "torch.mul(a, b)", "!a.mul_(b)", "!*="], ()),
    "maximum": (["torch.maximum(a, b)", "torch.max(a, b)", "torch.fmax(a, b)"], ("a - b",)),
    "minimum": (["torch.minimum(a, b)", "torch.min(a, b)"], ("a - b",)),
    "first_order": (["torch.logaddexp(a, b)", "torch.hypot(a + 4, b + 4)"], ()),
}  # fmt: skip
PROBES = 24  # draws that say how large a value is and whether it is positive


@dataclass
class Value:
    probe: Tensor
    memory: int  # which values share it
    positive: bool = False


class Builder:
    """Grows one program, line by line; a line that plain torch refuses is not taken."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.dtype = self.rng.choice([torch.float32] * 6 + [torch.float64] * 4 + [torch.bfloat16])
        self.training = self.rng.random() < 0.5
        self.model = nn.Module()
        self.steps: list[Step] = []
        self.values: dict[str, Value] = {}
        self.reusable: list[tuple[str, tuple[int, ...], Law]] = []
        self.count = 0
        self.memories = 0
        self.refused = ""

    def run(self) -> Program:
        batch = self.rng.choice([2, 3, 4])
        shape = self.rng.choice([(4,), (6,), (3,), (8,), (3, 4), (4, 2, 2), (2, 3, 3)])
        probe = torch.randn(PROBES * batch, *shape).to(self.dtype)
        self.values["v0"] = Value(probe, self.fresh_memory())
        stem = {1: "nn.Linear({c}, {n})", 2: "nn.Conv1d({c}, {n}, 3, padding=1)", 3: "nn.Conv2d({c}, {n}, 3, padding=1)"}
        self.linear_module("v0", stem[len(shape)])
        wanted, tries = self.rng.randint(4, 11), 0
        while len(self.steps) < wanted and tries < 150:
            tries += 1
            self.grow()
        if self.rng.random() < 0.03:
            self.refusable()
        model = self.model.to(self.dtype).train(self.training)
        outputs = tuple(name for name in self.values if name != "v0" or self.rng.random() < 0.3)
        steps = tuple(self.steps)
        with_forward(model, source(steps, outputs), self.seed)
        return Program(self.seed, steps, outputs, model, (batch, *shape), self.dtype, self.refused)

    # --- pieces ---------------------------------------------------------------------------------

    def fresh_memory(self) -> int:
        self.memories += 1
        return self.memories

    def pick(self, ok: Callable[[Value], bool] = lambda v: True) -> str | None:
        names = [name for name, value in self.values.items() if ok(value)]
        if not names:
            return None
        return names[-1] if self.rng.random() < 0.6 else self.rng.choice(names)

    def register(self, text: str) -> str:
        """A module of this text, and the name of it."""
        module = eval(text, dict(SCOPE)).to(self.dtype).train(self.training)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith("weight") and parameter.ndim == 1 and parameter.numel() > 1:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.3)
            for name, buffer in module.named_buffers():
                if name.endswith("running_var"):
                    buffer.uniform_(0.5, 2.0)
                elif name.endswith("running_mean"):
                    buffer.normal_(0, 0.3)
        name = f"m{len(list(self.model.children()))}"
        self.model.add_module(name, module)
        return name

    def constant(self, *shape: int) -> str:
        name = f"c{self.count}_{len(self.model._buffers)}"
        self.model.register_buffer(name, (torch.randn(shape) / max(1, shape[0]) ** 0.5).to(self.dtype))
        return f"self.{name}"

    def add(
        self, line: str, out: str, parts: tuple[Part, ...], overwrites: str = "", shares: str = "", positive: bool = False
    ) -> bool:
        """Take the line if torch runs it and its value is of a fair size."""
        scope = {**SCOPE, "self": self.model, **{name: value.probe for name, value in self.values.items()}}
        if overwrites:
            if any(step == 0 and n > 1 for n, step in zip(scope[overwrites].shape, scope[overwrites].stride(), strict=True)):
                return False  # an expanded tensor, which torch does not write into
            scope[overwrites] = scope[overwrites].clone()
        try:
            with torch.no_grad():
                exec(line, scope)
        except Exception:
            return False
        made = scope[out]
        for name, value in self.values.items():
            if made is value.probe and not overwrites:  # a cast to its own type is the value itself
                parts, shares = (Part(out, name, (name,), Law("same")),), name
        first = next(iter(self.values.values())).probe
        fair = isinstance(made, Tensor) and made.is_floating_point() and 2 <= made.ndim <= 5 and len(made) == len(first)
        # One number for each example is a score, which leaves at its mean.
        if not fair or not 1 < made[0].numel() <= LARGEST or not bool((made.abs() < 25).all()):
            return False
        memory = self.values[shares].memory if shares else self.fresh_memory()
        if overwrites:
            gone = self.values[overwrites].memory
            self.values = {name: v for name, v in self.values.items() if v.memory != gone}
        self.values[out] = Value(made, memory, positive and bool((made > 0.3).all()))
        self.steps.append(Step(line, out, parts))
        self.count += 1
        return True

    def name(self) -> str:
        return f"v{self.count + 1}"

    def simple(
        self, expression: str, x: str, law: Law, overwrites: bool = False, positive: bool = False, shares: bool = False
    ) -> bool:
        """A line of one value, written with ``x`` for it."""
        expression = re.sub(r"\bx\b", x, expression)
        law = Law(law.kind, tuple(re.sub(r"\bx\b", x, b) for b in law.breaks), law.several, law.partial, law.options)
        out = self.name()
        part = Part(out, expression, (x,), law)
        return self.add(f"{out} = {expression}", out, (part,), x if overwrites else "", x if shares else "", positive)

    def with_module(self, text: str, x: str, law: Law, overwrites: bool = False, shares: bool = False) -> bool:
        """A line that calls a new module on ``x``."""
        try:
            name = self.register(text)
        except Exception:
            return False
        law = Law(law.kind, law.breaks, law.several, law.partial, {**law.options, "module": name})
        done = self.simple(f"self.{name}(x)", x, law, overwrites, shares=shares)
        if not done:
            delattr(self.model, name)
        elif not overwrites and not shares:
            self.reusable.append((name, tuple(self.values[x].probe.shape[1:]), law))
        return done

    # --- kinds of lines -------------------------------------------------------------------------

    def grow(self) -> None:
        kinds: list[tuple[int, Callable[[], Any]]] = [
            (9, self.linear_module_of_any), (8, self.linear_function), (12, self.activation), (3, self.affine), (4, self.norm),
            (7, self.binary), (2, self.joined), (2, self.lognormal), (2, self.dropout), (2, self.softmax), (2, self.reuse),
            (1, self.attention), (1, self.glu), (1, self.reduction), (1, self.choice), (1, self.matrices), (1, self.extremum),
            (1, self.addcmul), (1, self.unreferenced), (1, self.cast), (1, self.setitem), (1, self.exponentials),
        ]  # fmt: skip
        weights, functions = zip(*kinds, strict=True)
        self.rng.choices(functions, weights)[0]()

    def dimensions(self, x: str) -> dict[str, int]:
        shape = self.values[x].probe.shape
        return {"c": shape[1], "l": shape[-1], "n": self.rng.choice([2, 3, 4, 6, 8])}

    def linear_module(self, x: str, text: str) -> bool:
        return self.with_module(text.format(**self.dimensions(x)), x, Law("linear"), shares=bool(NOT_COPIES.search(text)))

    def linear_module_of_any(self) -> None:
        x = self.pick()
        if x:
            self.linear_module(x, self.rng.choice(LINEAR_MODULES[self.values[x].probe.ndim]))

    def linear_function(self) -> None:
        x = self.pick()
        if not x:
            return
        expression = self.rng.choice(LINEAR_FUNCTIONS[self.values[x].probe.ndim])
        channels = self.values[x].probe.shape[1]
        if "self.v" in expression:
            expression = expression.replace("self.v", self.constant(channels))
        if "self.w" in expression:
            expression = expression.replace("self.w", self.constant(channels, self.rng.choice([2, channels])))
        law = Law("linear")
        if KEEPS_PLACES.search(expression) and "masked_fill" not in expression:
            law = Law("elementwise")
        self.simple(expression, x, law, shares=bool(NOT_COPIES.search(expression)))

    def spelled(self, text: str) -> tuple[str, bool]:
        return text.lstrip("!"), text.startswith("!")

    def activation(self) -> None:
        x = self.pick()
        if not x:
            return
        chosen = self.rng.choice(UNARY)
        options = {"indicator": True} if "sign" in chosen.spellings[0] else {}
        if "sinc" in chosen.spellings[0]:
            options = {"coarse": 100.0}  # three times as steep as what the library's nodes are spread for
        law = Law("elementwise", chosen.breaks, options=options)
        if chosen.modules and self.rng.random() < 0.4:
            text, overwrites = self.spelled(self.rng.choice(chosen.modules))
            if not (overwrites and x == "v0"):
                self.with_module(text, x, law, overwrites)
            return
        text, overwrites = self.spelled(self.rng.choice(chosen.spellings))
        if not (overwrites and x == "v0"):
            self.simple(text, x, law, overwrites)

    def affine(self) -> None:
        x = self.pick()
        text, overwrites = self.spelled(self.rng.choice(AFFINE))
        if x and not (overwrites and x == "v0"):
            self.simple(text, x, Law("elementwise"), overwrites)

    def lognormal(self) -> None:
        x = self.pick(lambda v: v.positive)
        if x and self.rng.random() < 0.7:
            expression = self.rng.choice(LOGNORMAL)
            self.simple(expression, x, Law("elementwise", several="", partial="/" not in expression and "recip" not in expression,
                                           options={"lognormal": expression}))  # fmt: skip
        elif x := self.pick():
            self.simple(self.rng.choice(POSITIVE), x, Law("elementwise"), positive=True)

    def norm(self) -> None:
        x = self.pick()
        if not x:
            return
        text = self.rng.choice(NORMS[self.values[x].probe.ndim])
        shape = self.values[x].probe.shape
        per_sample = shape[1:].numel()
        if "BatchNorm" in text:
            law = Law("batch_norm")
        elif "RMS" in text:
            law = Law("standardized", options={"n": shape[-1], "centred": False, "eps": None})
        elif "normalize" in text:
            law = Law("standardized", options={"n": shape[1], "centred": False, "eps": 1e-24 / shape[1], "unit": True})
        elif "ayer" in text:
            law = Law("standardized", options={"n": per_sample if "({c}, {l})" in text else shape[-1]})
        elif "roup" in text:
            law = Law("standardized", options={"n": per_sample // (2 if "(2," in text else 1)})
        else:
            law = Law("standardized", options={"n": per_sample // shape[1]})
        if law.kind == "standardized" and law.options["n"] < 3:
            return
        if text.startswith("nn."):
            self.with_module(text.format(**self.dimensions(x)), x, law)
        else:
            self.simple(text, x, law)

    def pair(self) -> tuple[str, str] | None:
        a = self.pick()
        if not a:
            return None
        shape = self.values[a].probe.shape
        others = []
        for name, value in self.values.items():
            try:
                if name != a and torch.broadcast_shapes(value.probe.shape, shape) in (shape, value.probe.shape):
                    others.append(name)
            except RuntimeError:
                continue
        return (a, self.rng.choice(others)) if others else None

    def binary(self) -> None:
        found = self.pair()
        if not found:
            return
        a, b = found
        several = self.rng.choice(["sum"] * 5 + ["product"] * 3 + ["maximum", "minimum", "first_order"])
        spellings, breaks = BINARY[several]
        text, overwrites = self.spelled(self.rng.choice(spellings))
        if overwrites and (a == "v0" or self.values[a].memory == self.values[b].memory):
            return
        out = self.name()
        breaks = tuple(re.sub(r"\b[ab]\b", lambda m: {"a": a, "b": b}[m[0]], each) for each in breaks)
        if text in ("+=", "-=", "*="):
            expression = f"{a} {text[0]} {b}"
            line = f"{a} {text} {b}; {out} = {a}"
        else:
            expression = re.sub(r"\b[ab]\b", lambda m: {"a": a, "b": b}[m[0]], text)
            line = f"{out} = {expression}"
        self.add(line, out, (Part(out, expression, (a, b), Law("elementwise", breaks, several)),), a if overwrites else "")

    def joined(self) -> None:
        """cat and stack of two values."""
        a = self.pick()
        if not a:
            return
        shape = self.values[a].probe.shape
        others = [n for n, v in self.values.items() if v.probe.ndim == len(shape) and v.probe.shape[2:] == shape[2:] and n != a]
        if others:
            b, out = self.rng.choice(others), self.name()
            text = self.rng.choice(["torch.cat([{a}, {b}], 1)", "torch.cat(({a}, {b}), dim=1)", "torch.cat([{b}, {a}, {a}], 1)",
                                    "torch.concat([{a}, 2 * {b}], 1)", "torch.stack([{a}, {b}], 1)"])  # fmt: skip
            text = text.format(a=a, b=b)
            self.add(f"{out} = {text}", out, (Part(out, text, (a, b), Law("linear")),))

    def dropout(self) -> None:
        x = self.pick()
        if not x:
            return
        p = self.rng.choice([0.1, 0.3, 0.5])
        dims = {3: "1d", 4: "2d", 5: "3d"}.get(self.values[x].probe.ndim, "")
        text = self.rng.choice([f"nn.Dropout({p})", f"F.dropout(x, {p}, self.training)", f"nn.Dropout{dims}({p})",
                                f"nn.AlphaDropout({p})", f"F.alpha_dropout(x, {p}, self.training)"])  # fmt: skip
        kind = "alpha_dropout" if "lpha" in text else "dropout"
        law = Law(kind, options={"p": p}) if self.training else Law("same")
        if text.startswith("nn."):
            self.with_module(text, x, law, shares=not self.training)
        else:
            self.simple(text, x, law, shares=not self.training)

    def softmax(self) -> None:
        x = self.pick()
        dim = self.rng.choice([1, -1])
        if not x or self.values[x].probe.shape[dim] == 1:
            return
        kind = self.rng.choice(["softmax", "softmax", "log_softmax"])
        text = self.rng.choice([f"F.{kind}(x, dim={dim})", f"torch.{kind}(x, {dim})", f"x.{kind}({dim})",
                                f"nn.{'Softmax' if kind == 'softmax' else 'LogSoftmax'}(dim={dim})"])  # fmt: skip
        law = Law(kind, options={"dim": dim})
        if text.startswith("nn."):
            self.with_module(text, x, law)
        else:
            self.simple(text, x, law)

    def reuse(self) -> None:
        """A module once more, on the same value or on another one."""
        if not self.reusable:
            return
        name, shape, law = self.rng.choice(self.reusable)
        x = self.pick(lambda v: tuple(v.probe.shape[1:]) == shape)
        if x:
            self.simple(f"self.{name}(x)", x, law)

    def attention(self) -> None:
        q = self.pick(lambda v: v.probe.ndim in (3, 4) and v.probe.shape[-1] > 1)
        if not q:
            return
        shape = self.values[q].probe.shape
        k = self.pick(lambda v: v.probe.shape == shape) or q
        v = self.pick(lambda v: v.probe.shape == shape) or q
        out = self.name()
        if self.rng.random() < 0.5:
            text = f"F.scaled_dot_product_attention({q}, {k}, {v})"
            options: dict[str, Any] = {"q": q, "k": k, "v": v, "scale": shape[-1] ** -0.5}
            self.add(f"{out} = {text}", out, (Part(out, text, (q, k, v), Law("attention", options=options)),))
            return
        if k != q and self.values[k].memory == self.values[q].memory:
            return  # perhaps the same variable by another name
        turned, s, w = f"{out}_k", f"{out}_s", f"{out}_w"
        weights = f"torch.softmax({s}, -1)"
        apart = (
            Part(turned, f"{k}.transpose(-2, -1)", (k,), Law("linear")),
            Part(s, f"{q} @ {turned} * 0.5", (q, turned), Law("bilinear")),
        )
        itself = (Part(s, f"{q} @ {q}.transpose(-2, -1) * 0.5", (q,), Law("quadratic")),)
        parts = (
            *(itself if k == q else apart),
            Part(w, weights, (s,), Law("softmax", options={"dim": -1})),
            Part(out, f"{w} @ {v}", (w, v), Law("bilinear")),
        )
        self.add(f"{s} = {q} @ {k}.transpose(-2, -1) * 0.5; {w} = {weights}; {out} = {w} @ {v}", out, parts)

    def glu(self) -> None:
        x = self.pick(lambda v: v.probe.shape[1] % 2 == 0)
        if x:
            out = self.name()
            first, second, gate = f"{out}_a", f"{out}_b", f"{out}_g"
            parts = (
                Part(first, f"{x}.chunk(2, 1)[0]", (x,), Law("linear")),
                Part(second, f"{x}.chunk(2, 1)[1]", (x,), Law("linear")),
                Part(gate, f"torch.sigmoid({second})", (second,), Law("elementwise")),
                Part(out, f"{first} * {gate}", (first, gate), Law("elementwise", several="product")),
            )
            self.add(f"{out} = F.glu({x}, 1)", out, parts)

    def reduction(self) -> None:
        x = self.pick(lambda v: v.probe.ndim > 2)
        if not x:
            return
        out = self.name()
        kind = self.rng.choice(["var", "norm", "prod"])
        if kind == "var":
            correction = self.rng.choice([0, 1])
            text = "x.var(-1, correction={})" if self.rng.random() < 0.5 else "torch.var(x, -1, correction={})"
            self.simple(text.format(correction), x, Law("variance", options={"correction": correction}))
        elif kind == "prod":
            self.simple("torch.prod(x, -1)", x, Law("prod"))
        else:
            square, total = f"{out}_q", f"{out}_t"
            parts = (
                Part(square, f"{x} * {x}", (x,), Law("elementwise")),
                Part(total, f"{square}.sum(-1)", (square,), Law("linear")),
                Part(out, f"torch.sqrt({total})", (total,), Law("elementwise", partial=True, options={"lognormal": "sqrt"})),
            )
            text = self.rng.choice([f"{x}.norm(dim=-1)", f"torch.linalg.vector_norm({x}, dim=-1)", f"({x} * {x}).sum(-1).sqrt()"])
            self.add(f"{out} = {text}", out, parts)

    def exponentials(self) -> None:
        x = self.pick(lambda v: v.probe.ndim > 2)
        if x:
            out = self.name()
            self.add(f"{out} = torch.logsumexp({x}, -1)", out, (Part(out, f"torch.logsumexp({x}, -1)", (x,), Law("laws")),))

    def choice(self) -> None:
        """where with a random condition."""
        found = self.pair()
        if not found:
            return
        a, b = found
        c = self.pick(lambda v: v.probe.shape == self.values[a].probe.shape)
        if not c or self.values[a].probe.shape != self.values[b].probe.shape:
            return
        out = self.name()
        mask = f"{out}_c"
        parts = (
            Part(mask, f"({c} > 0.1).to({c}.dtype)", (c,), Law("elementwise", (f"{c} - 0.1",))),
            Part(out, f"torch.where({mask} > 0.5, {a}, {b})", (mask, a, b), Law("elementwise", (), "where")),
        )
        self.add(f"{out} = torch.where({c} > 0.1, {a}, {b})", out, parts)

    def matrices(self) -> None:
        """A product of two random matrices."""
        a = self.pick(lambda v: v.probe.ndim == 3)
        if not a:
            return
        size = self.values[a].probe.shape[-1]
        b = self.pick(lambda v: v.probe.ndim == 3 and v.probe.shape[1] == size)
        if b and b != a:
            out = self.name()
            text = self.rng.choice(["{a} @ {b}", "torch.bmm({a}, {b})", "torch.einsum('bij,bjk->bik', {a}, {b})"])
            text = text.format(a=a, b=b)
            self.add(f"{out} = {text}", out, (Part(out, text, (a, b), Law("bilinear")),))

    def extremum(self) -> None:
        """Maxima over several elements: approximate by declaration, so held to sampling with the declared error."""
        x = self.pick(lambda v: v.probe.ndim > 2)
        if not x:
            return
        rank = self.values[x].probe.ndim - 2
        pools = {1: "F.max_pool1d(x, 2)", 2: "F.max_pool2d(x, 2)", 3: "F.max_pool3d(x, (1, 2, 1))"}
        pool = pools[rank]
        text = self.rng.choice(["torch.amax(x, -1)", "x.max(-1).values", "x.min(-1)[0]", pool, pool, "x.amin(1, True)"])
        self.simple(text, x, Law("sampled", options={"mean_error": 0.08, "var_error": 0.36}))

    def addcmul(self) -> None:
        found = self.pair()
        c = self.pick()
        if found and c and self.values[c].probe.shape == self.values[found[0]].probe.shape and c not in found:
            (a, b), out = found, self.name()
            product = f"{out}_p"
            parts = (
                Part(product, f"{b} * {c}", (b, c), Law("elementwise", several="product")),
                Part(out, f"{a} + 0.5 * {product}", (a, product), Law("elementwise", several="sum")),
            )
            text = self.rng.choice([f"torch.addcmul({a}, {b}, {c}, value=0.5)", f"{a} + 0.5 * ({b} * {c})"])
            self.add(f"{out} = {text}", out, parts)

    def unreferenced(self) -> None:
        """Operations for which the laws alone are asked: what is left out between their own parts has no closed form."""
        x = self.pick(lambda v: v.probe.ndim in (2, 3, 4))
        if not x:
            return
        shape = self.values[x].probe.shape
        text = {
            2: ["nn.GRUCell({c}, 3)", "torch.sort(x, 1).values", "F.normalize(x, p=1.0, dim=1)", "torch.std(x, 1, keepdim=True)"],
            3: ["nn.GRU({l}, 3, batch_first=True)", "nn.LSTM({l}, 2, batch_first=True)", "F.local_response_norm(x, 2)",
                "nn.TransformerEncoderLayer({l}, 1, 4, batch_first=True, dropout=0.0)",
                "nn.MultiheadAttention({l}, 1, batch_first=True)",
                "torch.topk(x, 2, -1).values", "F.cosine_similarity(x, x.flip(1), dim=-1)", "F.rrelu(x)",
                "F.local_response_norm(x, 3)"],
            4: ["F.local_response_norm(x, 2)", "F.rrelu(x)", "F.lp_pool2d(x.abs() + 1, 2.0, 2)", "F.local_response_norm(x, 3)"],
        }[len(shape)]  # fmt: skip
        chosen = self.rng.choice(text).format(**self.dimensions(x))
        if not chosen.startswith("nn."):
            self.simple(chosen, x, Law("elementwise", ("x",)) if "rrelu" in chosen else Law("laws"))
            return
        name = self.register(chosen)
        if "Attention" in chosen:
            done = self.simple(f"self.{name}(x, x, x, need_weights=False)[0]", x, Law("laws"))
        else:
            done = self.simple(f"self.{name}(x)" + ("[0]" if "GRU(" in chosen or "LSTM(" in chosen else ""), x, Law("laws"))
        if not done:
            delattr(self.model, name)

    def cast(self) -> None:
        x = self.pick()
        if x:
            to, dtype = self.rng.choice([("x.float()", torch.float32), ("x.double()", torch.float64), ("x.half()", torch.float16),
                                         ("x.to(torch.bfloat16)", torch.bfloat16), ("x.type(torch.float32)",
        torch.float32)])  # fmt: skip
            back = self.rng.choice([f".to({self.dtype})", f".type({self.dtype})", ".to(self.like)"])
            if "like" in back:
                back = back.replace("self.like", self.constant(1))
            self.simple(to + back, x, Law("cast", options={"dtype": dtype}), shares=True)

    def setitem(self) -> None:
        """A write into part of a copy."""
        x = self.pick(lambda v: v.probe.shape[1] > 1)
        if not x:
            return
        out = self.name()
        if self.rng.random() < 0.5:
            expression = f"torch.cat([{x}[:, :1], torch.full_like({x}[:, :1], 0.37), {x}[:, 2:]], 1)"
            line = f"{out} = {x}.clone(); {out}[:, 1] = 0.37"
        else:
            expression = f"torch.cat([{x}[:, :1], 2 * {x}[:, :1], {x}[:, 2:]], 1)"
            line = f"{out} = {x}.clone(); {out}[:, 1] = 2 * {x}[:, 0]"
        self.add(line, out, (Part(out, expression, (x,), Law("linear")),))

    def refusable(self) -> None:
        """A line that has no moments: conversion must refuse it."""
        x = self.pick()
        if not x:
            return
        out = self.name()
        text = self.rng.choice(["{x} if {x}.sum() > 0 else -{x}", "{x} * float({x}.max())"]).format(x=x)
        if self.add(f"{out} = {text}", out, (Part(out, text, (x,), Law("laws")),)):
            self.refused = "reads a value"


def generate(seed: int) -> Program:
    """The program of a seed, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Builder(seed).run()
