"""One or more cases for every registered rule: how the oracle and the laws call it. A new rule needs a line here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.oracle import Case

CASES: list[Case] = []
X = (3, 4)  # a batch of three


def case(rule, call, *shapes, **options):
    CASES.append(Case(rule, call, shapes or (X,), **options))


def by_name(names, make, *shapes, **options):
    """Cases of operations that are called alike: ``make(name)`` is the call."""
    for name in names.split():
        case(name, make(name), *shapes, **options)


def function(name):
    for namespace in (torch, F, torch.special, torch.linalg):
        if hasattr(namespace, name):
            return getattr(namespace, name)
    raise AttributeError(name)


def unary(name):
    f = function(name)
    return lambda w, x: f(x)


def binary(name):
    f = function(name)
    return lambda w, x, y: f(x, y)


def with_constant(name):
    f = function(name)
    return lambda w, x: f(x, w.positive(4))


# ---- elementwise -------------------------------------------------------------------------------------------------

_PLAIN_MODULES = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "hardshrink": nn.Hardshrink,
    "softshrink": nn.Softshrink,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "softsign": nn.Softsign,
    "logsigmoid": nn.LogSigmoid,
    "tanhshrink": nn.Tanhshrink,
    "leaky_relu": nn.LeakyReLU,
}
for _name in (
    "relu leaky_relu relu6 hardtanh hardsigmoid hardswish hardshrink softshrink elu selu celu gelu silu tanh "
    "sigmoid softplus mish softsign logsigmoid abs absolute exp expm1 square sin cos erf sinh cosh atan arctan "
    "asinh arcsinh erfc exp2 sinc i0 i0e i1e ndtr tanhshrink log_ndtr neg negative deg2rad rad2deg nan_to_num"
).split():
    _f = F.logsigmoid if _name == "logsigmoid" else function(_name)
    _modules = (_PLAIN_MODULES[_name],) if _name in _PLAIN_MODULES else ()
    case(
        _name,
        lambda w, x, f=_f: f(x),
        modules=_modules,
        scales=(1.0,),
        kinked=_name
        in ("relu leaky_relu hardshrink softshrink abs absolute relu6 hardtanh hardsigmoid hardswish elu i0".split()),
    )
for _name in "relu leaky_relu gelu silu tanh sigmoid softplus mish elu selu hardswish hardtanh".split():
    case(_name, lambda w, x, f=function(_name): f(x), var=9.0, spread=3.0, label="wide", scales=(1.0,), kinked=True)
case("leaky_relu", lambda w, x: F.leaky_relu(x, 0.3), modules=(lambda: nn.LeakyReLU(0.3),), label="slope", kinked=True)
case("hardtanh", lambda w, x: F.hardtanh(x, -0.3, 0.6), modules=(lambda: nn.Hardtanh(-0.3, 0.6),), label="bounds", kinked=True)
case("softshrink", lambda w, x: F.softshrink(x, 0.2), modules=(lambda: nn.Softshrink(0.2),), label="lambda", kinked=True)
case("threshold", lambda w, x: F.threshold(x, 0.2, -0.5), modules=(lambda: nn.Threshold(0.2, -0.5),), kinked=True)
case("elu", lambda w, x: F.elu(x, 0.5), modules=(lambda: nn.ELU(0.5),), label="alpha")
case("celu", lambda w, x: F.celu(x, 0.5), modules=(lambda: nn.CELU(0.5),), label="alpha")
case("gelu", lambda w, x: F.gelu(x, approximate="tanh"), modules=(lambda: nn.GELU("tanh"),), label="tanh")
case("softplus", lambda w, x: F.softplus(x, 2.0, 10.0), var=2.0, label="low threshold")
case("softplus", lambda w, x: F.softplus(x, 2.0, 10.0), modules=(lambda: nn.Softplus(2.0, 10.0),), label="beta", kinked=True)
case("prelu", lambda w, x: F.prelu(x, w(1)), kinked=True, label="one")
case("prelu", lambda w, x: F.prelu(x, w(4)), (3, 4, 2), kinked=True, label="channels")
case("prelu", lambda w, x: w.module(lambda: nn.PReLU(4))(x), kinked=True, label="module")
case("rrelu", lambda w, x: F.rrelu(x), modules=(lambda: nn.RReLU().eval(),))
case("rrelu", lambda w, x: F.rrelu(x, 0.1, 0.9, training=True), random=True, label="training")
for _name in ("clamp", "clip"):
    case(_name, lambda w, x, f=function(_name): f(x, -0.4, 0.7), kinked=True)
    case(_name, lambda w, x, f=function(_name): f(x, max=0.3), kinked=True, label="above")
case("clamp", lambda w, x: torch.clamp(x, min=-w.positive(4), max=w.positive(4)), kinked=True, label="tensors")
case("clamp", lambda w, x, y: torch.clamp(x, min=y), X, X, label="random bound")
case("clamp_min", lambda w, x: torch.clamp_min(x, 0.2), kinked=True)
case("clamp_max", lambda w, x: torch.clamp_max(x, 0.2), kinked=True)
by_name(
    "sqrt rsqrt log log2 log10 log1p", unary, offset=4.0, spread=0.4, var=0.1, mean_error=0.005, var_error=0.02, scales=(1.0,)
)
by_name(
    "asin acos atanh acosh arcsin arccos arctanh arccosh tan logit erfinv lgamma digamma",
    lambda name: lambda w, x, f=function(name): f(x if "cosh" not in name else x + 2.5),
    offset=0.4,
    spread=0.05,
    var=0.003,
    mean_error=0.13,
    var_error=0.1,
    scales=(1.0,),
)
case("glu", lambda w, x: F.glu(x), modules=(nn.GLU,))
case("glu", lambda w, x: F.glu(x, 1), (2, 4, 3), modules=(lambda: nn.GLU(1),), label="dim")

# ---- arithmetic --------------------------------------------------------------------------------------------------

for _name in ["add", "sub", "subtract", "mul", "multiply"]:
    case(_name, binary(_name), X, X)
    case(_name, with_constant(_name), label="constant")
    case(_name, lambda w, x, y, f=function(_name): f(x, y), (3, 4), (4,), batch=None, label="broadcast")
case("add", lambda w, x, y: torch.add(x, y, alpha=0.5), X, X, label="alpha")
case("sub", lambda w, x, y: torch.sub(x, y, alpha=2), X, X, label="alpha")
case("add", lambda w, x: x + x, label="twice", scales=(1.0,))
case("sub", lambda w, x: x - x, label="itself", scales=(1.0,))
case("mul", lambda w, x: x * x.clone(), label="a copy", scales=(1.0,))
case("mul", lambda w, x: x * x.contiguous().to(x.dtype), label="itself", scales=(1.0,))
case("mul", lambda w, x: x * torch.deg2rad(40 * x), label="of its own multiple", scales=(1.0,))
_BROADCAST = {"offset": 3.0, "var": 0.1, "mean_error": 0.1, "var_error": 0.02, "batch": None, "scales": (1.0,)}
case("logaddexp", lambda w, x, y: torch.logaddexp(x, y), (3, 4), (4,), label="broadcast", **_BROADCAST)
case("sigmoid", lambda w, x: torch.special.expit(x), label="expit")
case("add", lambda w, x: 2.0 + x, label="number")
case("sub", lambda w, x: 2.0 - x, label="reflected")
case("mul", lambda w, x: x * x, label="square")
case("mul", lambda w, x: x * torch.sigmoid(x), label="silu")
case("mul", lambda w, x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), label="gelu")
case("mul", lambda w, x: x * F.relu6(x + 3) / 6, label="hardswish by hand", kinked=False)
case("add", lambda w, x: x + torch.relu(1 - 2 * x), label="kink through a line")
case("mul", lambda w, x, y: x * y, X, X, var=4.0, label="wide")
case("rsub", lambda w, x: torch.rsub(x, 1.5))
case("rsub", lambda w, x, y: torch.rsub(x, y, alpha=2), X, X, label="alpha")
for _name in ("div", "divide", "true_divide"):
    case(_name, with_constant(_name), scales=(1.0,))
case("div", lambda w, x: x / 3.0, label="number")
case("div", lambda w, x, y: x / (y + 6.0), X, X, var=0.3, mean_error=0.01, var_error=0.02, label="random")
case("div", lambda w, x: x / (1 + x.abs()), label="softsign")
for _mode in ("floor", "trunc"):
    case(
        "div",
        lambda w, x, m=_mode: torch.div(x, 2.0, rounding_mode=m),
        label=_mode,
        var=4.0,
        kinked=True,
        mean_error=0.05,
        var_error=0.05,
    )
case("rdiv", lambda w, x: 2.0 / x, offset=6.0, var=0.3, mean_error=0.01, var_error=0.05)
case("reciprocal", lambda w, x: torch.reciprocal(x), offset=6.0, var=0.3, mean_error=0.01, var_error=0.05)
case("addcmul", lambda w, x, y, z: torch.addcmul(x, y, z, value=0.5), X, X, X)
case("addcmul", lambda w, x: torch.addcmul(w(4), x, w(4)), label="constants")
case("addcdiv", lambda w, x, y: torch.addcdiv(x, y, w.positive(4), value=0.5), X, X)
case("lerp", lambda w, x, y: torch.lerp(x, y, 0.3), X, X)
case("lerp", lambda w, x, y, z: torch.lerp(x, y, z), X, X, X, label="random weight")
case("pow", lambda w, x: x**2)
case("pow", lambda w, x: torch.pow(x, 3), label="cube")
case("pow", lambda w, x: torch.pow(x, 4), label="fourth")
case("pow", lambda w, x: x**0.5, offset=5.0, spread=0.5, var=0.05, label="root")
case("pow", lambda w, x: torch.pow(w.positive(4), x), label="exponent")
case("pow", lambda w, x: torch.pow(x, w.positive(4)), offset=6.0, spread=0.5, var=0.2, label="tensor")
case("pow", lambda w, x: torch.pow(x, -w.positive(4)), offset=6.0, spread=0.5, var=0.05, label="negative tensor")
case("float_power", lambda w, x: torch.float_power(x, 2))
case("rpow", lambda w, x: 2.0**x)
for _name in "atan2 arctan2 hypot logaddexp logaddexp2 copysign".split():
    case(_name, with_constant(_name), mean_error=0.01, var_error=0.02)
    if _name != "copysign":
        case(_name, binary(_name), X, X, offset=3.0, var=0.1, mean_error=0.1, var_error=0.02, label="random", scales=(1.0,))
case("ldexp", lambda w, x: torch.ldexp(x, w.tensor(1, 2, 0, 3)), mean_error=0.01, var_error=0.01)
by_name(
    "fmod remainder floor_divide",
    lambda name: lambda w, x, f=function(name): f(x, 0.7),
    var=1.5,
    mean_error=0.4,
    var_error=0.25,
    scales=(1.0,),
)
by_name("round floor ceil trunc fix frac", unary, var=1.5, mean_error=0.15, var_error=0.3, scales=(1.0,))
by_name("sign sgn", unary, kinked=True, scales=(1.0,))
case("heaviside", lambda w, x: torch.heaviside(x, w.positive(4)), kinked=True)
case("xlogy", lambda w, x, y: torch.xlogy(x, y + 5), X, X, var=0.2, mean_error=0.01, var_error=0.02)
for _name in "gt ge lt le greater less greater_equal less_equal".split():
    case(_name, lambda w, x, f=function(_name): f(x, 0.3), kinked=True, scales=(1.0,))
    case(_name, binary(_name), X, X, label="random", scales=(1.0,))
by_name("eq ne not_equal", lambda name: lambda w, x, f=function(name): f(x, 0.25), scales=(1.0,))
by_name(
    "logical_and logical_or logical_xor",
    lambda name: lambda w, x, y, f=function(name): f(x > 0, y > 0.5),
    X,
    X,
    scales=(1.0,),
)
case("logical_and", lambda w, x: (x > -0.5) & (x < 0.5), label="interval", kinked=True)
case("logical_and", lambda w, x: (x > -0.5) & w.mask(4), label="mask", kinked=True)
case("logical_not", lambda w, x: torch.logical_not(x > 0), kinked=True)
case("bitwise_not", lambda w, x: torch.bitwise_not(x > 0), kinked=True)
case("where", lambda w, x, y: torch.where(w.mask(3, 4), x, y), X, X, batch=None)
case("where", lambda w, x: torch.where(w.mask(3, 4), x, 0.0), batch=None, label="number")
case("where", lambda w, x: torch.where(x > 0, x, 0.3 * (torch.exp(x) - 1)), label="elu")
case("where", lambda w, x, y, z: torch.where(x > 0, y, z), X, X, X, label="random condition")
case("Tensor.where", lambda w, x, y: x.where(w.mask(3, 4), y), X, X, batch=None)

# ---- extrema and order -------------------------------------------------------------------------------------------

by_name("maximum minimum fmax fmin", binary, X, X)
case("maximum", lambda w, x: torch.maximum(x, w(4) / 4), label="constant", kinked=True, scales=(1.0,))
case("maximum", lambda w, x, y: torch.maximum(x, y), X, X, var=6.0, label="wide")
case("maximum", lambda w, x: torch.maximum(x, 0.2 * x), label="leaky relu")
_CLARK = {"mean_error": 0.08, "var_error": 0.36}
for _name in ("max", "min"):
    case(_name, lambda w, x, f=function(_name): f(x), (5,), batch=None, **_CLARK)
    case(_name, lambda w, x, f=function(_name): f(x, 1), (3, 5), label="dim", **_CLARK)
    case(_name, lambda w, x, f=function(_name): f(x, dim=-1, keepdim=True), (3, 5), label="keepdim", **_CLARK)
    case(_name, binary(_name), X, X, label="pair")
for _name in ("amax", "amin"):
    case(_name, lambda w, x, f=function(_name): f(x, (1, 3)), (3, 2, 2, 3), **_CLARK)
    case(_name, lambda w, x, f=function(_name): f(x, (-1, 1), True), (3, 2, 2, 3), label="keepdim", **_CLARK)
_APART = {"spread": 6.0, "var": 0.02, "mean_error": 0.02, "var_error": 0.05}
case("sort", lambda w, x: torch.sort(x, descending=True), **_APART)
case("sort", lambda w, x: torch.sort(x, 0), batch=None, label="dim", **_APART)
case("topk", lambda w, x: torch.topk(x, 2), **_APART)
case("kthvalue", lambda w, x: torch.kthvalue(x, 2), **_APART)
by_name("argmax argmin argsort", unary, **_APART)
for _name in "bool byte char short int long".split():
    case(_name, lambda w, x, to=_name: getattr(x > 0, to)(), **_APART)

# ---- softmax and attention ---------------------------------------------------------------------------------------

_SOFTMAX = {"mean_error": 0.02, "var_error": 0.28}
case("softmax", lambda w, x: F.softmax(x, -1), modules=(lambda: nn.Softmax(-1),), **_SOFTMAX)
case("softmax", lambda w, x: torch.softmax(x, 1), (2, 5, 2), var=0.1, label="narrow", mean_error=0.01, var_error=0.02)
case("softmax", lambda w, x: F.softmax(x, -3), (2, 4, 2, 2), modules=(nn.Softmax2d,), label="channels", **_SOFTMAX)
case(
    "softmax",
    lambda w, x: F.softmax(x.masked_fill(w.tensor(False, True, False, False), -torch.inf), -1),
    label="masked",
    **_SOFTMAX,
)
case("softmin", lambda w, x: F.softmin(x, -1), modules=(lambda: nn.Softmin(-1),), **_SOFTMAX)
case("log_softmax", lambda w, x: F.log_softmax(x, -1), modules=(lambda: nn.LogSoftmax(-1),), mean_error=0.01, var_error=0.1)
_QKV = ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4))
_ATTEND = {"var": 0.05, "mean_error": 0.04, "var_error": 0.76}
case("scaled_dot_product_attention", lambda w, q, k, v: F.scaled_dot_product_attention(q, k, v), *_QKV, **_ATTEND)
case(
    "scaled_dot_product_attention",
    lambda w, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
    *_QKV,
    label="causal",
    **_ATTEND,
)
case(
    "scaled_dot_product_attention",
    lambda w, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=w.tensor([True, False, True, True, False])),
    *_QKV,
    label="mask",
    **_ATTEND,
)
case(
    "scaled_dot_product_attention",
    lambda w, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=w.tensor([[True] * 5, [False] * 5, [True] * 5])),
    *_QKV,
    label="closed query",
    **_ATTEND,
)
case(
    "scaled_dot_product_attention",
    lambda w, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=w(3, 5)),
    *_QKV,
    label="bias",
    scales=(1.0,),
    **_ATTEND,
)
case(
    "scaled_dot_product_attention",
    lambda w, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    (2, 4, 3, 4),
    (2, 2, 5, 4),
    (2, 2, 5, 4),
    label="grouped",
    **_ATTEND,
)
case(
    "scaled_dot_product_attention",
    lambda w, q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3),
    *_QKV,
    label="dropout",
    random=True,
    **_ATTEND,
)
_ATTENTION = {"var": 0.05, "mean_error": 0.08, "var_error": 0.7, "scales": (1.0,)}
case(
    "multi_head_attention_forward",
    lambda w, x: w.module(lambda: nn.MultiheadAttention(4, 2, batch_first=True).eval())(x, x, x, need_weights=False)[0],
    (2, 3, 4),
    **_ATTENTION,
)
case(
    "multi_head_attention_forward",
    lambda w, q, k: w.module(lambda: nn.MultiheadAttention(4, 2))(q, k, k)[0],
    (3, 2, 4),
    (5, 2, 4),
    batch=1,
    label="training, weights",
    **_ATTENTION,
)
case(
    "multi_head_attention_forward",
    lambda w, x: w.module(lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval())(x),
    (2, 3, 4),
    label="encoder layer",
    composed=True,
)
case(
    "multi_head_attention_forward",
    lambda w, x, m: w.module(lambda: nn.TransformerDecoderLayer(4, 2, 8, batch_first=True).eval())(x, m),
    (2, 3, 4),
    (2, 5, 4),
    label="decoder layer",
    composed=True,
)

# ---- dropout -----------------------------------------------------------------------------------------------------

for _name, _module, _shape in (
    ("dropout", nn.Dropout, X),
    ("dropout1d", nn.Dropout1d, (2, 3, 4)),
    ("dropout2d", nn.Dropout2d, (2, 3, 2, 2)),
    ("dropout3d", nn.Dropout3d, (2, 3, 2, 2, 1)),
    ("alpha_dropout", nn.AlphaDropout, X),
    ("feature_alpha_dropout", nn.FeatureAlphaDropout, (2, 3, 4)),
):
    _f = function(_name)
    case(_name, lambda w, x, f=_f: f(x, 0.3, True), _shape, random=True, modules=(lambda m=_module: m(0.3),))
    case(_name, lambda w, x, f=_f: f(x, 0.3, False), _shape, label="eval", modules=(lambda m=_module: m(0.3).eval(),))
case("feature_dropout", lambda w, x: torch.feature_dropout(x, 0.3, True), (2, 3, 4), random=True)

# ---- linear maps -------------------------------------------------------------------------------------------------

case("linear", lambda w, x: F.linear(x, w(5, 4), w(5)))
case("linear", lambda w, x: w.module(lambda: nn.Linear(4, 5))(x), (3, 2, 4), label="module")
case("linear", lambda w, x, weight: F.linear(x, weight, w(5)), X, (5, 4), batch=None, label="random weight")
for _n, _conv, _transposed in (
    (1, nn.Conv1d, nn.ConvTranspose1d),
    (2, nn.Conv2d, nn.ConvTranspose2d),
    (3, nn.Conv3d, nn.ConvTranspose3d),
):
    _image = (2, 4, *((6,), (5, 4), (3, 4, 3))[_n - 1])
    _options = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
    _weights = (4, 2, *(3,) * _n)
    case(f"conv{_n}d", lambda w, x, n=_n, o=_options, s=_weights: getattr(F, f"conv{n}d")(x, w(*s), w(4), **o), _image)
    case(
        f"conv{_n}d",
        lambda w, x, n=_n, s=(3, 4, *(3,) * _n): getattr(F, f"conv{n}d")(x, w(*s), padding="same"),
        _image,
        label="same",
    )
    case(
        f"conv_transpose{_n}d",
        lambda w, x, n=_n, o={**_options, "output_padding": 1}, s=_weights: getattr(F, f"conv_transpose{n}d")(
            x, w(*s), w(4), **o
        ),
        _image,
        scales=(1.0,),
    )
    case(f"conv_transpose{_n}d", lambda w, x, m=_transposed: w.module(lambda: m(4, 3, 3, 2, 1, 1))(x), _image, label="module")
    for _mode in ("zeros", "reflect", "replicate", "circular"):
        case(
            f"conv{_n}d",
            lambda w, x, m=_conv, p=_mode: w.module(lambda: m(4, 3, 3, padding=1, dilation=1, padding_mode=p))(x),
            _image,
            label=_mode,
            scales=(1.0,),
            composed=_mode in ("reflect", "replicate"),  # one element twice in a window
        )
case("matmul", lambda w, x: x @ w(4, 5))
case("matmul", lambda w, x, y: torch.matmul(x, y), (2, 3, 4), (2, 4, 2), label="random")
case("rmatmul", lambda w, x: torch.Tensor.__rmatmul__(x, w(5, 3)), batch=None)
case("mm", lambda w, x, y: torch.mm(x, y), (3, 4), (4, 2), batch=None)
case("sparse.mm", lambda w, x: torch.sparse.mm(w(3, 4).to_sparse(), x), (4, 2), batch=None)
case("bmm", lambda w, x, y: torch.bmm(x, y), (2, 3, 4), (2, 4, 2))
case("mv", lambda w, x: torch.mv(x, w(4)))
by_name("dot vdot inner", binary, (4,), (4,), batch=None)
by_name("outer ger", binary, (3,), (4,), batch=None)
case("kron", binary("kron"), (2, 2), (2, 3), batch=None)
case("vecdot", lambda w, x, y: torch.linalg.vecdot(x, y), X, X)
case("inner", lambda w, x: torch.inner(x, w(5, 4)), label="constant")
case("outer", lambda w, x: torch.outer(w(3), x), (4,), batch=None, label="constant")
case("tensordot", lambda w, x: torch.tensordot(w(2, 4, 3), x, dims=([1, 2], [1, -2])), (3, 4), batch=None, label="dims")
case("linear", lambda w, x, b: F.linear(x, w(5, 4), b), (3, 4), (5,), batch=None, label="random bias")
case("conv2d", lambda w, x, b: F.conv2d(x, w(4, 2, 3, 3), b), (2, 2, 4, 5), (4,), batch=None, label="random bias")
case("conv_transpose1d", lambda w, x, b: F.conv_transpose1d(x, w(2, 3, 2), b), (2, 2, 4), (3,), batch=None, label="random bias")
case("tensordot", lambda w, x: torch.tensordot(x, w(4, 2, 5), dims=2), (3, 4, 2))
case("tensordot", lambda w, x, y: torch.tensordot(x, y, dims=([1], [0])), (3, 4), (4, 2), batch=None, label="random")
case("addmm", lambda w, x, y: torch.addmm(w(2), x, y, beta=0.5, alpha=2), (3, 4), (4, 2), batch=None)
case("baddbmm", lambda w, x, y: torch.baddbmm(w(2, 3, 2), x, y, beta=0.5, alpha=2), (2, 3, 4), (2, 4, 2), batch=None)
case("addbmm", lambda w, x, y: torch.addbmm(w(3, 2), x, y, alpha=2), (2, 3, 4), (2, 4, 2), batch=None)
case("addmv", lambda w, x, y: torch.addmv(y, x, w(4)), (3, 4), (3,))
case("addr", lambda w, x, y: torch.addr(w(3, 4), x, y), (3,), (4,), batch=None)
case("chain_matmul", lambda w, x: torch.chain_matmul(x, w(4, 2), w(2, 5)), var_error=0.3)
case("multi_dot", lambda w, x: torch.linalg.multi_dot([w(2, 3), x, w(4, 2)]), batch=None, var_error=0.3)
case("bilinear", lambda w, x: F.bilinear(x, w(3, 2), w(5, 4, 2), w(5)), batch=None, label="constant")
case("bilinear", lambda w, x, y: F.bilinear(x, y, w(5, 4, 2)), (3, 4), (3, 2))
case("bilinear", lambda w, x, y: w.module(lambda: nn.Bilinear(4, 2, 5))(x, y), (3, 4), (3, 2), label="module")
case("cross", binary("cross"), (4, 3), (4, 3))
case("linalg_cross", lambda w, x, y: torch.linalg.cross(x, y), (4, 3), (4, 3))
case("einsum", lambda w, x: torch.einsum("bi,oi->bo", x, w(5, 4)))
case("einsum", lambda w, x, y: torch.einsum("bij,bjk->bik", x, y), (2, 3, 4), (2, 4, 2), label="random")
case("einsum", lambda w, x: torch.einsum("bij->bi", x), (2, 3, 4), label="one")
case("einsum", lambda w, x, y: torch.einsum("i,j->", x, y), (3,), (4,), batch=None, label="sums")
case("einsum", lambda w, x: torch.einsum("...i,ij,kl->...jl", x, w(4, 2), w(3, 2)), label="three")
case("einsum", lambda w, x: torch.einsum("bi, oi", x, w(5, 4)), label="implicit")

# ---- normalization -----------------------------------------------------------------------------------------------

_BATCH = {"mean_error": 0.05, "var_error": 0.2, "scales": (1.0,)}
_NORMS = {"var": 0.3, "mean_error": 0.01, "var_error": 0.05}
for _module, _shape in (
    (nn.BatchNorm1d, (64, 2)),
    (nn.BatchNorm2d, (8, 2, 4, 3)),
    (nn.BatchNorm3d, (8, 2, 2, 3, 2)),
    (nn.SyncBatchNorm, (8, 2, 9)),
):
    case(
        "sync_batch_norm" if _module is nn.SyncBatchNorm else "batch_norm",
        lambda w, x, m=_module, c=_shape[1]: w.module(lambda: m(c).eval())(x),
        _shape,
        label=f"{_module.__name__}, eval",
    )
    case(
        "sync_batch_norm" if _module is nn.SyncBatchNorm else "batch_norm",
        lambda w, x, m=_module, c=_shape[1]: w.module(lambda: m(c, track_running_stats=False))(x),
        _shape,
        label=_module.__name__,
        **_BATCH,
    )
case("layer_norm", lambda w, x: F.layer_norm(x, (24,), w(24), w(24)), (3, 24), **_NORMS)
case("layer_norm", lambda w, x: F.layer_norm(x, (3, 2)), (3, 3, 2), label="few", var=0.2, mean_error=0.02, var_error=0.05)
case("layer_norm", lambda w, x: w.module(lambda: nn.LayerNorm(24))(x), (3, 24), label="module", **_NORMS)
case("rms_norm", lambda w, x: F.rms_norm(x, (24,), w(24)), (3, 24), **_NORMS)
# Weight and bias given by a style, of an input that is random or is not.
_STYLES = {"batch": None, "label": "style", "mean_error": 0.05, "var_error": 0.1}
case("batch_norm", lambda w, a, b: F.batch_norm(w(6, 2, 3), None, None, a, b, True), (2,), (2,), **_STYLES)
case("batch_norm", lambda w, x, a: F.batch_norm(x, w(2), w.positive(2), a), (6, 2, 3), (2,), batch=None, label="style, evaluated")
case("instance_norm", lambda w, x, a, b: F.instance_norm(x, weight=a, bias=b), (2, 2, 18), (2,), (2,), **_STYLES)
case("group_norm", lambda w, a: F.group_norm(w(3, 4, 3), 2, a), (4,), **_STYLES)
case("layer_norm", lambda w, x, a, b: F.layer_norm(x, (24,), a, b), (3, 24), (24,), (24,), **_STYLES)
case("rms_norm", lambda w, a: F.rms_norm(w(3, 24), (24,), a), (24,), **_STYLES)
case("linear", lambda w, b: F.linear(w(3, 4), w(5, 4), b), (5,), batch=None, label="bias alone")
case("rms_norm", lambda w, x: w.module(lambda: nn.RMSNorm(6))(x), (3, 6), label="few", var=0.2, mean_error=0.02, var_error=0.05)
case("group_norm", lambda w, x: F.group_norm(x, 2, w(4), w(4)), (3, 4, 3, 4), **_NORMS)
case(
    "group_norm",
    lambda w, x: w.module(lambda: nn.GroupNorm(2, 4))(x),
    (3, 4, 4),
    label="few",
    var=0.2,
    mean_error=0.02,
    var_error=0.12,
)
case("group_norm", lambda w, x: F.group_norm(x, 2, w(4), w(4)), (2, 4, 12, 12), label="many", **_NORMS)
case("instance_norm", lambda w, x: F.instance_norm(x, weight=w(2), bias=w(2)), (2, 2, 18, 15), label="many", **_NORMS)
for _module, _shape in ((nn.InstanceNorm1d, (2, 3, 24)), (nn.InstanceNorm2d, (2, 3, 4, 6)), (nn.InstanceNorm3d, (2, 2, 2, 3, 4))):
    case(
        "instance_norm",
        lambda w, x, m=_module, c=_shape[1]: w.module(lambda: m(c, affine=True))(x),
        _shape,
        label=_module.__name__,
        **_NORMS,
    )
case(
    "instance_norm",
    lambda w, x: w.module(lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True).eval())(x),
    (2, 3, 5),
    label="running statistics",
)
case(
    "local_response_norm",
    lambda w, x: F.local_response_norm(x, 3),
    (2, 4, 3),
    modules=(lambda: nn.LocalResponseNorm(3),),
    mean_error=0.01,
    var_error=0.01,
)

# ---- pooling -----------------------------------------------------------------------------------------------------

_IMAGES = {1: (2, 3, 7), 2: (2, 2, 7, 6), 3: (2, 2, 4, 5, 4)}
for _n, _average, _adaptive, _max, _adaptive_max, _unpool, _lp in (
    (1, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.MaxPool1d, nn.AdaptiveMaxPool1d, nn.MaxUnpool1d, nn.LPPool1d),
    (2, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.MaxUnpool2d, nn.LPPool2d),
    (3, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.MaxPool3d, nn.AdaptiveMaxPool3d, nn.MaxUnpool3d, nn.LPPool3d),
):
    _image, _f, _g = _IMAGES[_n], getattr(F, f"avg_pool{_n}d"), getattr(F, f"max_pool{_n}d")
    case(f"avg_pool{_n}d", lambda w, x, f=_f: f(x, 2), _image, modules=(lambda m=_average: m(2),))
    for _options in (
        {"stride": 2, "padding": 1},
        {"stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False},
        {"stride": 2, "padding": 1, "ceil_mode": True},
        *([{"stride": 1, "divisor_override": 5}] if _n > 1 else []),
    ):
        case(
            f"avg_pool{_n}d",
            lambda w, x, f=_f, o=_options: f(x, 3, **o),
            _image,
            modules=(lambda m=_average, o=_options: m(3, **o),),
            label=", ".join(map(str, _options.values())),
            scales=(1.0,),
        )
    case(f"avg_pool{_n}d", lambda w, x, f=_f: f(x, 2), _image[1:], label="no batch")
    case(
        f"adaptive_avg_pool{_n}d",
        lambda w, x, f=getattr(F, f"adaptive_avg_pool{_n}d"): f(x, 3),
        _image,
        modules=(lambda m=_adaptive: m(3),),
    )
    case(f"max_pool{_n}d", lambda w, x, f=_g: f(x, 2), _image, modules=(lambda m=_max: m(2),), **_CLARK)
    for _options in (
        {"stride": 2, "padding": 1},
        {"stride": 2, "padding": 1, "ceil_mode": True},
        {"stride": 1, "dilation": 2},
    ):
        case(
            f"max_pool{_n}d",
            lambda w, x, f=_g, o=_options: f(x, 2, **o),
            _image,
            modules=(lambda m=_max, o=_options: m(2, **o),),
            label=", ".join(map(str, _options.values())),
            scales=(1.0,),
            **_CLARK,
        )
    case(f"max_pool{_n}d_with_indices", lambda w, x, f=_g: f(x, 2, return_indices=True), _image, **_CLARK)
    _h = getattr(F, f"adaptive_max_pool{_n}d")
    case(f"adaptive_max_pool{_n}d", lambda w, x, f=_h: f(x, 3), _image, modules=(lambda m=_adaptive_max: m(3),), **_CLARK)
    case(f"adaptive_max_pool{_n}d_with_indices", lambda w, x, f=_h: f(x, 2, return_indices=True), _image, **_CLARK)
    case(
        f"max_unpool{_n}d",
        lambda w, x, n=_n, m=_unpool: w.module(lambda: m(2))(x, w.tensor(*range(2**n)).expand(2, 2**n).reshape(2, 1, *(2,) * n)),
        (2, 1, *(2,) * _n),
    )
    case(
        f"lp_pool{_n}d",
        lambda w, x, f=getattr(F, f"lp_pool{_n}d"): f(x, 2.0, 2),
        _image,
        modules=(lambda m=_lp: m(2.0, 2),),
        offset=2.0,
        spread=0.5,
        var=0.2,
        mean_error=0.01,
        var_error=0.05,
    )

# ---- resampling --------------------------------------------------------------------------------------------------

_INTERPOLATE = [
    ((2, 2, 5), {"scale_factor": 2}),
    ((2, 2, 5), {"size": 8, "mode": "linear"}),
    ((2, 2, 5), {"size": 8, "mode": "linear", "align_corners": True}),
    ((2, 2, 5), {"size": 3, "mode": "area"}),
    ((2, 2, 4, 3), {"scale_factor": 2, "mode": "nearest"}),
    ((2, 2, 4, 3), {"size": (7, 5), "mode": "nearest-exact"}),
    ((2, 2, 4, 3), {"scale_factor": 2, "mode": "bilinear"}),
    ((2, 2, 4, 3), {"scale_factor": (1.7, 2.3), "mode": "bilinear"}),
    ((2, 2, 4, 3), {"scale_factor": (1.7, 2.3), "mode": "bilinear", "recompute_scale_factor": True}),
    ((2, 2, 4, 3), {"size": (8, 5), "mode": "bilinear", "align_corners": True}),
    ((2, 2, 6, 5), {"size": (3, 2), "mode": "bilinear", "antialias": True}),
    ((2, 2, 4, 3), {"size": (8, 7), "mode": "bicubic"}),
    ((2, 2, 4, 3), {"scale_factor": 1.5, "mode": "bicubic", "align_corners": True}),
    ((2, 2, 6, 5), {"size": (3, 2), "mode": "bicubic", "antialias": True}),
    ((2, 2, 4, 6), {"size": (2, 4), "mode": "area"}),
    ((2, 1, 2, 3, 2), {"scale_factor": 2}),
    ((2, 1, 2, 3, 2), {"scale_factor": 2, "mode": "trilinear"}),
    ((2, 1, 2, 3, 2), {"size": (3, 4, 5), "mode": "trilinear", "align_corners": True}),
    ((2, 1, 4, 3, 4), {"size": (2, 3, 2), "mode": "area"}),
]
for _shape, _options in _INTERPOLATE:
    _modules = () if "antialias" in _options else (lambda o=_options: nn.Upsample(**o),)
    case(
        "interpolate",
        lambda w, x, o=_options: F.interpolate(x, **o),
        _shape,
        modules=_modules,
        scales=(1.0,),
        label=", ".join(map(str, _options.values())),
    )
case(
    "interpolate",
    lambda w, x: F.interpolate(x, scale_factor=2),
    (2, 2, 4, 3),
    modules=(lambda: nn.UpsamplingNearest2d(scale_factor=2),),
    label="nearest module",
)
case(
    "interpolate",
    lambda w, x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
    (2, 2, 4, 3),
    modules=(lambda: nn.UpsamplingBilinear2d(scale_factor=2),),
    label="bilinear module",
)
case("fold", lambda w, x: F.fold(x, (4, 3), 2), (2, 8, 6), modules=(lambda: nn.Fold((4, 3), 2),))
case("fold", lambda w, x: F.fold(x, (4, 4), 2, padding=1, stride=2), (2, 8, 9), label="padding")
for _mode in ("bilinear", "nearest"):
    for _padding in ("zeros", "border", "reflection"):
        for _align in (False, True):
            case(
                "grid_sample",
                lambda w, x, m=_mode, p=_padding, a=_align: F.grid_sample(x, w(2, 3, 2, 2), m, p, a),
                (2, 2, 4, 3),
                batch=None,
                label=f"{_mode}, {_padding}, {_align}",
                scales=(0.8,),
            )
_RAMPS = torch.stack([torch.arange(5.0).expand(5, 5), torch.arange(5.0)[:, None] + 3 * torch.arange(5.0)]).double()
case(
    "grid_sample",
    lambda w, x: F.grid_sample(_RAMPS.to(x.dtype).expand(2, -1, -1, -1), x, align_corners=False),
    (2, 3, 2, 2),
    spread=0.2,
    var=0.003,
    label="random grid on a plane",
)
case(
    "grid_sample",
    lambda w, x, y: F.grid_sample(x, y, align_corners=False),
    (2, 2, 4, 3),
    (2, 3, 2, 2),
    composed=True,
    label="random image and grid",
)
case(
    "grid_sample",
    lambda w, x: F.grid_sample(x, w(2, 2, 3, 2, 3), align_corners=False),
    (2, 1, 3, 4, 3),
    batch=None,
    label="volume",
    scales=(0.8,),
)

# ---- recurrent ---------------------------------------------------------------------------------------------------

_RECURRENT = {"var": 0.1, "mean_error": 0.1, "var_error": 0.7, "scales": (1.0,)}
# Over several steps or layers the correlation that the rules leave out adds up: only the laws are asked there.
_COMPOSED = {"composed": True, "scales": (1.0,)}
for _name, _layer, _cell in (("lstm", nn.LSTM, nn.LSTMCell), ("gru", nn.GRU, nn.GRUCell), ("rnn_tanh", nn.RNN, nn.RNNCell)):
    case(_name, lambda w, x, m=_layer: w.module(lambda: m(3, 4))(x), (5, 2, 3), batch=1, **_RECURRENT)
    case(
        _name,
        lambda w, x, m=_layer: w.module(lambda: m(3, 4, 2, batch_first=True, bidirectional=True))(x)[0],
        (2, 4, 3),
        label="bidirectional",
        **_COMPOSED,
    )
    case(f"{_name}_cell", lambda w, x, m=_cell: w.module(lambda: m(3, 4))(x), (3, 3), **_RECURRENT)
case(
    "lstm",
    lambda w, x, h, c: w.module(lambda: nn.LSTM(3, 4))(x, (h, c)),
    (4, 2, 3),
    (1, 2, 4),
    (1, 2, 4),
    batch=1,
    label="states",
    **_RECURRENT,
)
case(
    "lstm",
    lambda w, x: w.module(lambda: nn.LSTM(3, 4, proj_size=2, bias=False))(x),
    (4, 2, 3),
    batch=1,
    label="projection",
    **_COMPOSED,
)
case(
    "lstm",
    lambda w, x: w.module(lambda: nn.LSTM(3, 4, 2, dropout=0.3))(x)[0],
    (4, 2, 3),
    batch=1,
    label="dropout",
    random=True,
    **_COMPOSED,
)
case("gru", lambda w, x: w.module(lambda: nn.GRU(3, 4))(x), (4, 3), batch=None, label="no batch", **_RECURRENT)
case("rnn_relu", lambda w, x: w.module(lambda: nn.RNN(3, 4, nonlinearity="relu"))(x), (4, 2, 3), batch=1, **_RECURRENT)
case("rnn_relu_cell", lambda w, x: w.module(lambda: nn.RNNCell(3, 4, nonlinearity="relu"))(x), (3, 3), **_RECURRENT)


def _packed(make):
    def call(w, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2, 1]), batch_first=True)
        out, hidden = w.module(make)(packed)
        return nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0], hidden

    return call


case(
    "lstm",
    _packed(lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)),
    (3, 4, 3),
    batch=None,
    label="packed",
    **_COMPOSED,
)
case(
    "gru", _packed(lambda: nn.GRU(3, 4, bidirectional=True, batch_first=True)), (3, 4, 3), batch=None, label="packed", **_COMPOSED
)
_LENGTHS = torch.tensor([4, 2, 1])
case("_pack_padded_sequence", lambda w, x: torch._VF._pack_padded_sequence(x, _LENGTHS, True)[0], (3, 4, 2), batch=None)
case(
    "_pad_packed_sequence",
    lambda w, x: torch._VF._pad_packed_sequence(x, torch.tensor([3, 2, 1, 1]), True, 0.0, 4)[0],
    (7, 2),
    batch=None,
)

# ---- reductions --------------------------------------------------------------------------------------------------

by_name("sum nansum mean nanmean prod", unary, batch=None)
by_name("sum nansum mean nanmean prod", lambda name: lambda w, x, f=function(name): f(x, 1), (3, 4, 2))
by_name("sum mean", lambda name: lambda w, x, f=function(name): f(x, (1, 2), keepdim=True), (3, 4, 2))
case("prod", lambda w, x: torch.prod(x, 1, keepdim=True), (3, 3, 2), label="keepdim")
case("cumsum", lambda w, x: torch.cumsum(x, 1))
case("cumprod", lambda w, x: torch.cumprod(x, 1))
case("trace", lambda w, x: torch.trace(x), (3, 3), batch=None)
case("sum_to_size", lambda w, x: x.sum_to_size(1, 4), batch=None)
by_name("var var_mean", unary, batch=None)
by_name("var var_mean", lambda name: lambda w, x, f=function(name): f(x, 1, keepdim=True), (3, 4, 2))
case("var", lambda w, x: torch.var(x, 1, correction=0), label="correction")
case("var", lambda w, x: torch.var(x, -1, False), label="biased")
_ROOTED = {"spread": 2.0, "var": 0.2, "mean_error": 0.01, "var_error": 0.02}
by_name("std std_mean", lambda name: lambda w, x, f=function(name): f(x, 1), (3, 8), **_ROOTED)
for _p in (1, 2, 3, torch.inf):
    case("norm", lambda w, x, p=_p: torch.norm(x, p, 1), (3, 6), label=str(_p), **_ROOTED)
case("norm", lambda w, x: x.norm(), batch=None, label="all", **_ROOTED)
case("vector_norm", lambda w, x: torch.linalg.vector_norm(x, 2, -1, keepdim=True), (3, 6), **_ROOTED)
case("linalg_norm", lambda w, x: torch.linalg.norm(x, dim=-1), (3, 6), **_ROOTED)
for _ord in (1, -1, 2, "nuc", "fro", float("inf")):
    case(
        "linalg_norm",
        lambda w, x, o=_ord: torch.linalg.norm(x, o, (-2, -1)),
        (3, 2, 3),
        label=f"matrix, {_ord}",
        var=1e-4,
        offset=2.0,
        mean_error=0.2,
        var_error=0.2,
    )
case("norm", lambda w, x: torch.norm(x, 0, 1), (3, 6), label="0")
case("pairwise_distance", lambda w, x, y: F.pairwise_distance(x, y), (3, 6), (3, 6), modules=(nn.PairwiseDistance,), **_ROOTED)
case("cdist", lambda w, x, y: torch.cdist(x, y), (2, 3, 5), (2, 2, 5), **_ROOTED)
case("cdist", lambda w, x, y: torch.cdist(x, y, 1.0), (2, 3, 5), (2, 2, 5), label="1", **_ROOTED)
case("dist", lambda w, x, y: torch.dist(x, y), X, X, batch=None, **_ROOTED)
case("normalize", lambda w, x: F.normalize(x, dim=1), (3, 6), **_ROOTED)
case("normalize", lambda w, x: F.normalize(x, dim=1), (3, 6), spread=0.0, var=0.0, label="nothing", scales=(1.0,))
case(
    "normalize", lambda w, x: F.normalize(x, p=1.0, dim=1), (3, 6), label="1", spread=2.0, var=0.2, mean_error=0.05, var_error=0.8
)
case(
    "cosine_similarity",
    lambda w, x, y: F.cosine_similarity(x, y),
    (3, 6),
    (3, 6),
    modules=(nn.CosineSimilarity,),
    spread=2.0,
    var=0.2,
    mean_error=0.02,
    var_error=0.2,
)
case("logsumexp", lambda w, x: torch.logsumexp(x, 1), mean_error=0.01, var_error=0.1)
case("logsumexp", lambda w, x: torch.logsumexp(x, (1, 2), keepdim=True), (2, 3, 2), label="dims", mean_error=0.01, var_error=0.1)
case("logcumsumexp", lambda w, x: torch.logcumsumexp(x, 1), mean_error=0.01, var_error=0.1)

# ---- losses: plain numbers, at the mean --------------------------------------------------------------------------


def loss(rule, module, call, *shapes, **options):
    case(rule, call, *shapes, scales=(1.0,), batch=None, **options)
    case(rule, lambda w, x, m=module: _loss_module(w, x, m), *shapes, scales=(1.0,), batch=None, label="module", **options)


def _loss_module(w, x, make):
    module, *targets = make(w)
    return module(x, *targets)


_CLASSES = torch.tensor([0, 2, 3])
for _name, _module in (
    ("mse_loss", nn.MSELoss),
    ("l1_loss", nn.L1Loss),
    ("smooth_l1_loss", nn.SmoothL1Loss),
    ("huber_loss", nn.HuberLoss),
    ("binary_cross_entropy_with_logits", nn.BCEWithLogitsLoss),
    ("kl_div", nn.KLDivLoss),
    ("soft_margin_loss", nn.SoftMarginLoss),
    ("hinge_embedding_loss", nn.HingeEmbeddingLoss),
    ("multilabel_soft_margin_loss", nn.MultiLabelSoftMarginLoss),
):
    loss(_name, lambda w, m=_module: (w.module(m), w.positive(3, 4)), lambda w, x, f=function(_name): f(x, w.positive(3, 4)))
loss(
    "binary_cross_entropy",
    lambda w: (w.module(nn.BCELoss), w.positive(3, 4) / 2),
    lambda w, x: F.binary_cross_entropy(x, w.positive(3, 4) / 2),
    offset=0.5,
    spread=0.05,
    var=0.001,
)
for _name, _module in (
    ("cross_entropy", nn.CrossEntropyLoss),
    ("nll_loss", nn.NLLLoss),
    ("multi_margin_loss", nn.MultiMarginLoss),
):
    loss(_name, lambda w, m=_module: (w.module(m), _CLASSES), lambda w, x, f=function(_name): f(x, _CLASSES))
loss(
    "multilabel_margin_loss",
    lambda w: (w.module(nn.MultiLabelMarginLoss), torch.tensor([[1, -1, 0, 0]] * 3)),
    lambda w, x: F.multilabel_margin_loss(x, torch.tensor([[1, -1, 0, 0]] * 3)),
)
loss(
    "gaussian_nll_loss",
    lambda w: (w.module(nn.GaussianNLLLoss), w(3, 4), w.positive(3, 4)),
    lambda w, x: F.gaussian_nll_loss(x, w(3, 4), w.positive(3, 4)),
)
loss(
    "poisson_nll_loss",
    lambda w: (w.module(nn.PoissonNLLLoss), w.positive(3, 4)),
    lambda w, x: F.poisson_nll_loss(x, w.positive(3, 4)),
)
_SIGNS = torch.tensor([1.0, -1.0, 1.0])
loss(
    "cosine_embedding_loss",
    lambda w: (w.module(nn.CosineEmbeddingLoss), w(3, 4), _SIGNS),
    lambda w, x: F.cosine_embedding_loss(x, w(3, 4), _SIGNS),
)
loss(
    "margin_ranking_loss",
    lambda w: (w.module(nn.MarginRankingLoss), w(3), _SIGNS),
    lambda w, x: F.margin_ranking_loss(x, w(3), _SIGNS),
    (3,),
)
loss(
    "triplet_margin_loss",
    lambda w: (w.module(nn.TripletMarginLoss), w(3, 4), w(3, 4)),
    lambda w, x: F.triplet_margin_loss(x, w(3, 4), w(3, 4)),
)
_CTC = (torch.tensor([[1, 2], [2, 1]]), torch.tensor([4, 4]), torch.tensor([2, 2]))
loss("ctc_loss", lambda w: (w.module(nn.CTCLoss), *_CTC), lambda w, x: F.ctc_loss(x, *_CTC), (4, 2, 3))

# ---- shapes ------------------------------------------------------------------------------------------------------

_B = (2, 3, 4)
_SHAPES = {
    "view": lambda w, x: x.view(2, -1),
    "reshape": lambda w, x: x.reshape(2, 12),
    "view_as": lambda w, x: x.view_as(torch.empty(2, 12)),
    "reshape_as": lambda w, x: x.reshape_as(torch.empty(2, 12)),
    "flatten": lambda w, x: torch.flatten(x, 1),
    "ravel": lambda w, x: torch.ravel(x),
    "unflatten": lambda w, x: torch.unflatten(x, 2, (2, 2)),
    "squeeze": lambda w, x: torch.squeeze(x[:, :1], 1),
    "unsqueeze": lambda w, x: x.unsqueeze(1),
    "permute": lambda w, x: x.permute(0, 2, 1),
    "transpose": lambda w, x: x.transpose(1, 2),
    "t": lambda w, x: x[0].t(),
    "movedim": lambda w, x: torch.movedim(x, 1, 2),
    "moveaxis": lambda w, x: torch.moveaxis(x, 1, 2),
    "swapaxes": lambda w, x: torch.swapaxes(x, 1, 2),
    "swapdims": lambda w, x: torch.swapdims(x, 1, 2),
    "adjoint": lambda w, x: torch.adjoint(x),
    "expand": lambda w, x: x.unsqueeze(1).expand(-1, 2, -1, -1),
    "expand_as": lambda w, x: x.expand_as(torch.empty(2, 2, 3, 4)),
    "repeat": lambda w, x: x.repeat(1, 2, 1),
    "tile": lambda w, x: torch.tile(x, (1, 2, 1)),
    "repeat_interleave": lambda w, x: torch.repeat_interleave(x, 2, 1),
    "broadcast_to": lambda w, x: torch.broadcast_to(x, (2, 2, 3, 4)),
    "contiguous": lambda w, x: x.contiguous(),
    "clone": lambda w, x: x.clone(),
    "detach": lambda w, x: x.detach(),
    "requires_grad_": lambda w, x: x.requires_grad_(),
    "float": lambda w, x: x.float(),
    "double": lambda w, x: x.double(),
    "half": lambda w, x: x.half().double(),
    "bfloat16": lambda w, x: x.bfloat16().double(),
    "cpu": lambda w, x: x.cpu(),
    "cuda": lambda w, x: x.cuda().cpu() if torch.cuda.is_available() else x,
    "pin_memory": lambda w, x: x.pin_memory() if torch.cuda.is_available() else x,
    "to_dense": lambda w, x: x.to_dense(),
    "retain_grad": lambda w, x: x.requires_grad_().retain_grad(),
    "T": lambda w, x: x[0].T,
    "mT": lambda w, x: x.mT,
    "H": lambda w, x: x[0].H,
    "mH": lambda w, x: x.mH,
    "real": lambda w, x: x.real,
    "data": lambda w, x: x.data,
    "narrow": lambda w, x: torch.narrow(x, 1, 1, 2),
    "narrow_copy": lambda w, x: torch.narrow_copy(x, 1, 1, 2),
    "select": lambda w, x: torch.select(x, 1, 1),
    "split": lambda w, x: torch.split(x, 2, 1),
    "split_with_sizes": lambda w, x: torch.split_with_sizes(x, [1, 2], 1),
    "chunk": lambda w, x: torch.chunk(x, 2, 1),
    "tensor_split": lambda w, x: torch.tensor_split(x, 2, 1),
    "unsafe_chunk": lambda w, x: torch.unsafe_chunk(x, 2, 1),
    "unsafe_split": lambda w, x: torch.unsafe_split(x, 2, 1),
    "hsplit": lambda w, x: torch.hsplit(x, 3),
    "vsplit": lambda w, x: torch.vsplit(x, 2),
    "dsplit": lambda w, x: torch.dsplit(x, 2),
    "unbind": lambda w, x: torch.unbind(x, 1),
    "diagonal": lambda w, x: torch.diagonal(x, 0, 1, 2),
    "diag": lambda w, x: torch.diag(x[0]),
    "diag_embed": lambda w, x: torch.diag_embed(x),
    "triu": lambda w, x: torch.triu(x),
    "tril": lambda w, x: torch.tril(x, 1),
    "flip": lambda w, x: torch.flip(x, (1,)),
    "fliplr": lambda w, x: torch.fliplr(x),
    "flipud": lambda w, x: torch.flipud(x),
    "rot90": lambda w, x: torch.rot90(x, 1, (1, 2)),
    "roll": lambda w, x: torch.roll(x, 1, 1),
    "index_select": lambda w, x: torch.index_select(x, 1, w.index(3, 5)),
    "take": lambda w, x: torch.take(x, w.index(24, 5)),
    "gather": lambda w, x: torch.gather(x, 1, w.index(3, 2, 2, 4)),
    "take_along_dim": lambda w, x: torch.take_along_dim(x, w.index(3, 2, 2, 4), 1),
    "masked_select": lambda w, x: torch.masked_select(x, w.mask(2, 3, 4)),
    "channel_shuffle": lambda w, x: F.channel_shuffle(x, 3),
    "slice_scatter": lambda w, x: torch.slice_scatter(x, torch.zeros(2, 1, 4, dtype=x.dtype), 1, 1, 2),
    "getitem": lambda w, x: x[:, 1:, None, ..., ::2],
    "atleast_1d": lambda w, x: torch.atleast_1d(x),
    "atleast_2d": lambda w, x: torch.atleast_2d(x),
    "atleast_3d": lambda w, x: torch.atleast_3d(x),
    "resolve_conj": lambda w, x: torch.resolve_conj(x),
    "resolve_neg": lambda w, x: torch.resolve_neg(x),
    "positive": lambda w, x: torch.positive(x),
    "to": lambda w, x: x.to(torch.float64),
    "type": lambda w, x: x.type(torch.float64),
    "type_as": lambda w, x: x.type_as(torch.zeros((), dtype=torch.float64)),
    "cat": lambda w, x: torch.cat((x, w(2, 1, 4)), 1),
    "concat": lambda w, x: torch.concat((x, w(2, 1, 4)), 1),
    "concatenate": lambda w, x: torch.concatenate((x, w(2, 1, 4)), 1),
    "stack": lambda w, x: torch.stack((x, w(2, 3, 4)), 1),
    "hstack": lambda w, x: torch.hstack((x, w(2, 3, 4))),
    "vstack": lambda w, x: torch.vstack((x, w(2, 3, 4))),
    "dstack": lambda w, x: torch.dstack((x, w(2, 3, 4))),
    "column_stack": lambda w, x: torch.column_stack((x, w(2, 3, 4))),
    "block_diag": lambda w, x: torch.block_diag(x[0], w(2, 2)),
    "broadcast_tensors": lambda w, x: torch.broadcast_tensors(x, w(4))[0],
    "pad": lambda w, x: F.pad(x, (1, 2)),
    "constant_pad_nd": lambda w, x: torch.constant_pad_nd(x, (1, 2), 3.0),
    "masked_fill": lambda w, x: torch.masked_fill(x, w.mask(2, 3, 4), 2.0),
    "masked_scatter": lambda w, x: torch.masked_scatter(x, w.mask(2, 3, 4), w(24)),
    "index_fill": lambda w, x: torch.index_fill(x, 1, w.tensor(0, 2), 5.0),
    "index_copy": lambda w, x: torch.index_copy(x, 1, w.tensor(0, 2), w(2, 2, 4)),
    "index_put": lambda w, x: torch.index_put(x, (w.tensor(0, 1), w.tensor(2, 1)), w(2, 4)),
    "scatter": lambda w, x: torch.scatter(x, 1, w.index(3, 2, 1, 4), w(2, 1, 4)),
    "select_scatter": lambda w, x: torch.select_scatter(x, w(2, 4), 1, 2),
    "fill": lambda w, x: torch.fill(x, 2.0),
    "zero_": lambda w, x: x.clone().zero_(),
}
_WITHOUT_BATCH = (
    "ravel t T H diag flipud roll take masked_select block_diag vsplit vstack gather take_along_dim masked_fill "
    "index_put masked_scatter scatter expand_as broadcast_to diag_embed"
).split()
_MIXING = (
    _WITHOUT_BATCH
    + (
        "cat concat concatenate stack hstack dstack column_stack index_copy select_scatter hstack atleast_3d broadcast_tensors"
    ).split()
)
for _name, _call in _SHAPES.items():
    case(_name, _call, _B, scales=(1.0,), batch=None if _name in _MIXING else 0)
case("unfold", lambda w, x: x.unfold(1, 2, 1), _B)
case("unfold", lambda w, x: F.unfold(x, 2, padding=1), (2, 2, 3, 4), modules=(lambda: nn.Unfold(2, padding=1),), label="image")
case("flatten", lambda w, x: torch.flatten(x, 1), _B, modules=(nn.Flatten,), label="module")
case("unflatten", lambda w, x: torch.unflatten(x, 1, (2, 2)), (2, 4), modules=(lambda: nn.Unflatten(1, (2, 2)),), label="module")
case("pixel_shuffle", lambda w, x: F.pixel_shuffle(x, 2), (2, 4, 3, 2), modules=(lambda: nn.PixelShuffle(2),))
case("pixel_unshuffle", lambda w, x: F.pixel_unshuffle(x, 2), (2, 1, 4, 2), modules=(lambda: nn.PixelUnshuffle(2),))
case("channel_shuffle", lambda w, x: F.channel_shuffle(x, 2), (2, 4, 2), modules=(lambda: nn.ChannelShuffle(2),), label="module")
case("view", lambda w, x: (x.unsqueeze(1) + w(1, 2, 1)).view(2, -1), (2, 3), batch=None, label="expanded variance")
for _mode in ("reflect", "replicate", "circular"):
    case("pad", lambda w, x, m=_mode: F.pad(x, (1, 2), mode=m), _B, label=_mode)
case("pad", lambda w, x: F.pad(x, (1, -1, 2, 0), value=3.0), _B, label="value")
case("cat", lambda w, x, y: torch.cat([x, y], dim=1), (2, 3), (2, 1), label="random")
case("scatter", lambda w, x: torch.scatter(x, 1, w.index(3, 2, 1, 4), 2.0), _B, batch=None, label="value")
case("scatter", lambda w, x, y: torch.scatter(x, 1, w.index(3, 2, 1, 4), y), _B, (2, 1, 4), batch=None, label="random")
case("scatter_add", lambda w, x, y: torch.scatter_add(x, 1, w.index(3, 2, 2, 4), y), _B, (2, 2, 4), batch=None)
case("index_add", lambda w, x, y: torch.index_add(x, 1, w.tensor(0, 2), y, alpha=2), _B, (2, 2, 4), batch=None)
case("index_put", lambda w, x, y: torch.index_put(x, (w.tensor(0, 1), w.tensor(2, 1)), y), _B, (2, 4), batch=None, label="random")
case("broadcast_tensors", lambda w, x, y: torch.broadcast_tensors(x, y), (2, 3), (3,), batch=None, label="random")


def _written(w, x, y):
    z = x.clone()
    z[:, 1] = y
    z[:, 2, ::2] = 3.0
    return z


case("setitem", _written, _B, (2, 4))
case("copy_", lambda w, x, y: x.clone().copy_(y), _B, (2, 3, 1), batch=None)

# ---- questions: answered by the mean -----------------------------------------------------------------------------

_QUESTIONS = (
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex element_size "
    "get_device storage_offset is_pinned is_shared is_inference is_conj is_neg is_signed is_set_to isnan isinf "
    "isfinite isreal len"
).split()
_ARGUMENTS = {
    "is_set_to": lambda x: (torch.zeros(1, dtype=torch.float64),),
}
for _name in _QUESTIONS:
    case(
        _name,
        lambda w, x, n=_name: getattr(x, "__len__" if n == "len" else n)(*_ARGUMENTS.get(n, lambda x: ())(x)),
        scales=(1.0,),
    )
by_name("zeros_like ones_like empty_like", lambda name: lambda w, x, f=function(name): f(x) * 0, scales=(1.0,))
case("register_hook", lambda w, x: [x.requires_grad_().register_hook(lambda grad: None)], scales=(1.0,))
case("full_like", lambda w, x: torch.full_like(x, 2.0), scales=(1.0,))
by_name("new_zeros new_ones new_empty", lambda name: lambda w, x: getattr(x, name)(2) * 0, scales=(1.0,))
case(
    "_nested_tensor_from_mask_left_aligned",
    lambda w, x: torch._nested_tensor_from_mask_left_aligned(x, torch.ones(3, 4, dtype=torch.bool)),
    (3, 4, 2),
    scales=(1.0,),
)
case("new_full", lambda w, x: x.new_full((2,), 3.0), scales=(1.0,))
case("new_tensor", lambda w, x: x.new_tensor([1.0]), scales=(1.0,))
case("new", lambda w, x: x.new(2).zero_(), scales=(1.0,))
case("is_same_size", lambda w, x: torch.is_same_size(x, w(3, 4)), scales=(1.0,))
case("result_type", lambda w, x: torch.result_type(x, 1.0), scales=(1.0,))
case("can_cast", lambda w, x: torch.can_cast(x.dtype, torch.float64), scales=(1.0,))
case("is_tensor", lambda w, x: torch.is_tensor(x), scales=(1.0,))
case("broadcast_shapes", lambda w, x: torch.broadcast_shapes(x.shape, (1,)), scales=(1.0,))
by_name(
    "shape ndim dtype device layout requires_grad is_cuda is_leaf grad_fn is_nested is_sparse is_quantized is_cpu is_meta is_mps "
    "is_mkldnn is_sparse_csr itemsize nbytes output_nr retains_grad",
    lambda name: lambda w, x: getattr(x, name, None),
    scales=(1.0,),
)
