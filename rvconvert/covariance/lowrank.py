"""``covariance="lowrank"``: x = mean + factors^T e + d, by cubature over the latent noises e.

A noise source becomes n antithetic pairs of nodes, +sqrt(n) u_j and -sqrt(n) u_j with u_1 .. u_n an orthonormal frame
(third-degree spherical-radial cubature: Arasaratnam & Haykin, IEEE Trans. Automatic Control 54, 2009; randomly turned:
Genz & Monahan, SIAM J. Sci. Comput. 19, 1998). Every function runs as it is on all nodes. What is odd in the noise makes
the rows, which are covariances with it; what is even, the mean and the remainder. Means are exact for polynomials of third
degree in the noise, variances for linear ones, whatever the marginals in between look like.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree

from rvconvert.core.mode import MODES, Mode, Sampler
from rvconvert.core.random_variable import RandomVariable, Settings, is_in_place, random_variables
from rvconvert.covariance.rows import Rows, moved, reordered, still
from rvconvert.covariance.sampled import SampledVariable, drawn_paths, squared
from rvconvert.rules.calls import out_of_place, substitute
from rvconvert.rules.kinds import MOVES_ANY_LAYOUT, Collapse, Elementwise, Metadata, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rvconvert.core.registry import Rule
    from rvconvert.covariance.chunks import Chunks

__all__ = ["Frame", "LowRankVariable", "cubature_normal"]

# Fewer pairs miss too much beyond third degree: at a deviation of 1 the mean's error is .16 of decode(mu)'s with 8, .11 with 16.
_LEAST = 16
# Half as many pairs as latents keep that error at .16 (32 of 64), so this bounds the work for many latents.
_MOST = 64
# As many pairs as several sources together may need.
_JOINT = 4 * _MOST


class Frame:
    """The nodes of one noise source.

    Attributes:
        nodes: (n, k) values of a sample's k noises on the positive nodes, or None where each sample has its own.
        flips: numbers p of pairs; in every second p of them the two nodes of a pair trade places. Sources that differ in
            these are independent of each other on the nodes that they share.
    """

    def __init__(self, nodes: Tensor | None) -> None:
        self.nodes = nodes
        self.flips: frozenset[int] = frozenset()


class LowRankVariable(SampledVariable):
    """Jointly distributed random variables on cubature nodes.

    Attributes:
        paths: (2n, *shape); path j and path n + j are the two nodes of a pair.
        factors: (r, *shape); row j is the covariance with latent noise j, or with the j-th pair's direction where there
            are fewer pairs than latents or several noise sources. The noises are independent between samples.
        remainder: the variance that rows do not explain, shaped like the variable.
    """

    precedence = 15
    _frames: tuple[Frame, ...]
    _rows: Rows | None = None  # where the batch is, of a variable on nodes that its rows share
    _base: int = 0  # once rows have met: each row's pairs are in an order of its own, within blocks of so many

    @classmethod
    def of_frames(cls, paths: Tensor | Chunks, frames: tuple[Frame, ...], settings: Settings) -> LowRankVariable:
        """The variable with these values on the nodes of these frames."""
        made = cls.of_paths(paths, settings)
        assert isinstance(made, cls)
        made._frames = frames
        return made

    @property
    def pairs(self) -> int:
        return sum(map(len, self.chunks)) // 2

    def _halves(self) -> tuple[Tensor, Tensor]:
        """(n, *shape) each: centres of the pairs (even in the noise) and half differences (odd)."""
        above, below = self._paths_as_float().chunk(2)
        return (above + below) / 2, (above - below) / 2

    @property
    def _nodes(self) -> Tensor | None:
        """(n, k): the only source's noises, if they are the same for every sample."""
        nodes = self._frames[0].nodes if len(self._frames) == 1 and not self._base else None
        return None if nodes is None else nodes.to(self._paths_as_float().dtype)

    @property
    def var(self) -> Tensor:
        """Variances: mean square of the odd part, and the variance of the pairs' centres."""
        centres, odd = self._halves()
        return squared(odd).mean(0) + _variance(centres)

    _var = property(lambda self: self.var)

    @property
    def factors(self) -> Tensor:
        """(r, *shape): the covariance of each element with each noise, in units of the variable."""
        odd, nodes = self._halves()[1], self._nodes
        if nodes is None:
            return odd / math.sqrt(len(odd))
        return torch.einsum("nk,n...->k...", nodes, odd) / len(odd)

    @property
    def unexplained(self) -> Tensor:
        """Variance that the rows do not explain: of the pairs' centres, and what is odd but not linear in the noise."""
        centres, odd = self._halves()
        nodes, rest = self._nodes, _variance(centres)
        if nodes is None or nodes.shape[1] == len(odd):  # as many rows as pairs explain all that is odd
            return rest
        return rest + (odd - torch.einsum("nk,k...->n...", nodes, self.factors)).square().mean(0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, *shape) draws: Gaussian, with the covariance that the rows carry; the first dimension is the batch."""
        shape, device, dtype = self.shape, self.device, self.dtype
        out = self.mean + self.unexplained.sqrt() * torch.randn(n, *shape, device=device, dtype=dtype, generator=generator)
        each = (shape[0], *(1,) * (len(shape) - 1)) if shape else ()
        for row in self.factors:
            out = out + row * torch.randn(n, *each, device=device, dtype=dtype, generator=generator)
        return out

    def apply(self, rule: Rule, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The plain function on every path; where it lets rows meet that share their nodes, on nodes of each row's own."""
        # While compiling there are no values to try it on: rows are on nodes of their own from the start.
        if torch.compiler.is_compiling() or func is torch.autograd.grad:
            return super().apply(rule, func, args, kwargs)
        inputs = {id(x): x for x in random_variables(args, kwargs) if isinstance(x, LowRankVariable)}
        base = max((x._base for x in inputs.values()), default=0)
        rows = {x._rows for x in inputs.values() if x._rows is not None and not x._base}
        if base and rows:
            args, kwargs = _apart(args, kwargs, base)
        elif len(rows) > 1:
            base = _largest(inputs.values())
            args, kwargs = _apart(args, kwargs, base)
        result = super().apply(rule, func, args, kwargs)
        where = next(iter(rows)) if len(rows) == 1 else None
        if not base and where is not None and not isinstance(rule.kind, _ROW_BY_ROW) and rule.name not in _ROW_BY_ROW_NAMES:
            if isinstance(rule.kind, Shape) and len(inputs) == 1 and not _holds_floats(args, kwargs):
                if _located(result, func, args, kwargs, next(iter(inputs.values())), where):
                    return result
                where = None
            else:
                where = _rows_after(where, func, args, kwargs, inputs, result)
            if where is None:
                base = _largest(inputs.values())
                args, kwargs = _apart(args, kwargs, base)
                result = super().apply(rule, func, args, kwargs)
        for made in random_variables(result):
            if isinstance(made, LowRankVariable):
                made._base = base
                made._rows = where if where is not None and where.fits(made.shape) and not base else None
        return result

    def gradient(self, outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> Any:
        """``torch.autograd.grad`` along each path; a gradient has its rows where its variable has them."""
        found = super().gradient(outputs, inputs, grad_outputs, **options)
        for made, x in zip(found, random_variables(inputs), strict=True):
            if isinstance(made, LowRankVariable) and isinstance(x, LowRankVariable):
                made._rows, made._base = x._rows, x._base
        return found

    def joined(self, variables: Sequence[SampledVariable]) -> tuple[list[Chunks], Callable[[Chunks], SampledVariable]]:
        """The variables' paths on common nodes, and how a result is made of paths."""
        settings = self.settings
        found = [x for x in variables if isinstance(x, LowRankVariable)]
        frames: tuple[Frame, ...] = ()
        count = 1
        for x in found:
            count = _common(count, x.pairs)
            new = tuple(f for f in x._frames if f not in frames)
            if frames and new and settings.rank is None:
                count = _told_apart(frames, new, count)
            frames += new
        stacks = [x.chunks if x.pairs == count else (_spread(x, count),) for x in found]
        return stacks, lambda paths: LowRankVariable.of_frames(paths, frames, settings)


# One row of the result hangs on one row of the inputs, or the paths of all rows are taken together.
_ROW_BY_ROW = (Elementwise, Metadata, Collapse)
_ROW_BY_ROW_NAMES = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d batch_norm instance_norm group_norm "
    "layer_norm dropout interpolate masked_fill".split()
)


def _largest(variables: Iterable[LowRankVariable]) -> int:
    return max(x.pairs for x in variables)


def _apart(args: Any, kwargs: Any, base: int) -> tuple[Any, Any]:
    """The arguments with the rows of every variable on nodes of their own."""

    def apart(x: RandomVariable) -> RandomVariable:
        if not isinstance(x, LowRankVariable) or x._rows is None or x._base:
            return x
        paths = _spread(x, base) if base % x.pairs == 0 else x.paths
        if len(paths) // 2 % base:
            return x
        made = LowRankVariable.of_frames(reordered(paths, x._rows, base), x._frames, x.settings)
        made._base = base
        return made

    return substitute(args, apart), substitute(kwargs, apart)


def _holds_floats(*values: Any) -> bool:
    """True for arguments with a plain floating-point tensor in them."""
    return any(isinstance(x, Tensor) and x.is_floating_point() for x in _pytree.tree_leaves(values))


def _located(result: Any, func: Any, args: Any, kwargs: Any, x: LowRankVariable, rows: Rows) -> bool:
    """Tell each part of the result of a function that moves elements where its rows are; False if they lie nowhere whole."""
    func = MOVES_ANY_LAYOUT.get(func) or out_of_place(func)
    found = moved(
        rows, x.shape, lambda numbers: func(*substitute(args, lambda _: numbers), **substitute(kwargs, lambda _: numbers))
    )
    for made, where in zip(random_variables(result), found, strict=False):
        if isinstance(made, LowRankVariable):
            made._rows = where
    return all(where is not None for where in found)


def _rows_after(rows: Rows, func: Any, args: Any, kwargs: Any, inputs: dict[int, LowRankVariable], result: Any) -> Rows | None:
    """Where the rows are after the function; None where it, run on one path more, is seen to let them meet."""
    made = random_variables(result)
    if not made or not isinstance(made[0], LowRankVariable) or is_in_place(func, kwargs):
        return rows

    def plain(*values: Tensor) -> Any:
        value = dict(zip(inputs, values, strict=True))
        out = func(*substitute(args, lambda x: value[id(x)]), **substitute(kwargs, lambda x: value[id(x)]))
        return _pytree.tree_flatten(out)[0][0]

    values, others = ([x.chunks[i][i] for x in inputs.values()] for i in (0, -1))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return still(rows, plain, values, others, made[0].chunks[0][0])


def _told_apart(frames: tuple[Frame, ...], others: tuple[Frame, ...], count: int) -> int:
    """How many pairs keep the covariance of two groups of sources at 0: every node of one with both signs of the other's."""
    for period in (period for frame in (*frames, *others) for period in frame.flips):
        count = _common(count, 2 * period)
    if {f.flips for f in frames} & {f.flips for f in others} and 2 * count <= _JOINT:
        for frame in others:
            frame.flips |= {count}
        count *= 2
    return count


def _variance(centres: Tensor) -> Tensor:
    """Unbiased variance along the first dimension; of one value 0. A tenth of the time of torch.var."""
    return squared(centres - centres.mean(0)).sum(0) / max(len(centres) - 1, 1)


def _common(a: int, b: int) -> int:
    """How many pairs two sets of nodes are brought to: their least common multiple, if that is no great number."""
    common = math.lcm(a, b)
    return common if common <= _JOINT else max(a, b)


def _spread(x: LowRankVariable, count: int) -> Tensor:
    """(2 count, ...): the paths of ``x`` repeated, the nodes of pairs exchanged as the frame has it."""
    n, paths = x.pairs, x.paths
    if n == count:
        return paths
    pair = torch.arange(count, device=paths.device)
    exchanged = torch.zeros_like(pair)
    for period in x._frames[0].flips:
        if period >= n:
            exchanged = exchanged ^ (pair // period & 1)
    return paths[torch.cat((pair % n + n * exchanged, pair % n + n * (1 - exchanged)))]


def cubature_normal(zeros: Tensor, settings: Settings) -> LowRankVariable:
    """Standard normal variables shaped like ``zeros`` (first dimension: the batch) on cubature nodes.

    A sample of k elements gets ``settings.rank`` pairs, else k, but whole frames of 16 at least, and 64 at most. With k or
    more, the frames are the same for every sample (and fixed without a seed too), so that a sample's result does not depend on
    its batch; with fewer, each sample has random orthogonal directions of its own.
    """
    each = zeros.shape[1:] if zeros.ndim > 1 else zeros.shape
    elements = math.prod(each)
    pairs = settings.rank or min(elements * math.ceil(_LEAST / elements), _MOST)
    complete = pairs >= elements
    seed = (settings.seed or 0) + settings.source
    dtype = torch.promote_types(zeros.dtype, torch.float32)
    if complete:
        nodes = _kept_frames(pairs // elements, elements, seed, dtype, zeros.device).to(zeros.dtype)
        values = nodes.reshape(len(nodes), *(1,) * (zeros.ndim > 1), *each).expand(len(nodes), *zeros.shape)
        made = LowRankVariable.of_frames(torch.cat((values, -values)), (Frame(nodes),), settings)
        made._rows = Rows.first(zeros.shape)
        if torch.compiler.is_compiling() and made._rows is not None:
            return LowRankVariable.of_frames(reordered(made.paths, made._rows, len(nodes)), (Frame(None),), settings)
        return made
    generator = None if settings.seed is None else torch.Generator(zeros.device).manual_seed(seed)
    batch = zeros.shape[0] if zeros.ndim > 1 else 1
    directions = _orthonormal(torch.randn(batch, elements, pairs, dtype=dtype, device=zeros.device, generator=generator))
    values = math.sqrt(elements) * directions.movedim(2, 0).reshape(pairs, *zeros.shape).to(zeros.dtype)
    return LowRankVariable.of_frames(torch.cat((values, -values)), (Frame(None),), settings)


_FRAMES: dict[tuple[object, ...], Tensor] = {}


@torch.compiler.assume_constant_result
def _kept_frames(count: int, k: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``whole_frames``, drawn once; a constant of a compiled graph."""
    key = (count, k, seed, dtype, device)
    if key not in _FRAMES:
        with torch.inference_mode(False), torch.no_grad():  # what is kept must serve everywhere
            _FRAMES[key] = whole_frames(*key)
    return _FRAMES[key]


def whole_frames(count: int, k: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count k, k): ``count`` frames of k orthogonal nodes, randomly turned; their second moments are exactly 1.

    One frame has the radius sqrt(k); the squared radii of several are the means of the chi-squared law over as many equal
    parts of its probability, estimated from draws.
    """
    generator = torch.Generator(device).manual_seed(seed)
    frames = _orthonormal(torch.randn(count, k, k, dtype=dtype, device=device, generator=generator))
    if count > 1:
        draws = torch.randn(count * 256, k, dtype=dtype, device=device, generator=generator)
        squares = draws.square().sum(1).sort().values.reshape(count, 256).mean(1)
        frames = frames * (squares / squares.mean()).sqrt().reshape(count, 1, 1)
    return math.sqrt(k) * frames.reshape(count * k, k)


def _orthonormal(normal: Tensor) -> Tensor:
    """(batch, k, n): n orthonormal columns in directions that are uniform, out of standard normal draws."""
    directions, triangle = torch.linalg.qr(normal)
    signs: Tensor = torch.diagonal(triangle, dim1=-2, dim2=-1).sign().unsqueeze(-2)  # else not uniform (Mezzadri 2007)
    return directions * signs


def stratified_uniform(zeros: Tensor, settings: Settings) -> LowRankVariable:
    """Variables uniform on (0, 1) on cubature nodes: on 2n nodes an element takes the middles of 2n equal parts, in their order.

    So each element's own law is right however few nodes there are, a pair holds u and 1 - u, and the nodes stay near
    orthogonal (the ranks of a design keep its correlations: Iman & Conover 1982).
    """
    noise = cubature_normal(zeros, settings)
    rank = noise.paths.argsort(0).argsort(0).to(zeros.dtype)
    made = LowRankVariable.of_frames((rank + 0.5) / len(rank), (Frame(None),), settings)
    made._rows = noise._rows
    return made


def drawn_nodes(sampler: Sampler, zeros: Tensor, settings: Settings) -> LowRankVariable:
    """A variable on nodes that are drawn one by one, for a law without a quantile function; as many as a Gaussian's."""
    elements = math.prod(zeros.shape[1:] if zeros.ndim > 1 else zeros.shape)
    pairs = settings.rank or min(elements * math.ceil(_LEAST / elements), _MOST)
    seed = None if settings.seed is None else settings.seed + settings.source
    return LowRankVariable.of_frames(drawn_paths(sampler, 2 * pairs, zeros, seed), (Frame(None),), settings)


MODES["lowrank"] = Mode(cubature_normal, stratified_uniform, drawn_nodes)
