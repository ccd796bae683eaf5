"""``covariance="sampled"``: antithetic paths through the plain functions, folded into one call each.

A noise source becomes 2p paths, +e_1 .. +e_p, -e_1 .. -e_p, each e_i standard normal, orthogonal to the others
within a sample. Every function runs as it is on all paths at once, so no rule is needed and nothing is assumed.
Mean and variance are those across the paths; mean^2 + var is an unbiased estimate of the second moment.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree

from rvconvert.core.mode import MODES, Mode, Sampler
from rvconvert.core.random_variable import Identity, RandomVariable, Settings, is_in_place, propagate, random_variables
from rvconvert.core.registry import Exactness
from rvconvert.covariance.chunks import Chunks, JointBatchNorm, alike, joined
from rvconvert.errors import ConversionError
from rvconvert.rules.calls import substitute
from rvconvert.rules.kinds import Collapse, Metadata, Read
from rvconvert.rules.noise import entering
from rvconvert.rules.normalization import batch_norm_arguments
from rvconvert.rules.shape import setitem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rvconvert.core.registry import Rule

__all__ = ["SampledVariable", "antithetic_normal"]

# Statistics over the batch are those of all paths together, as the mixture law has it (paper eqs 10, 11).
_JOINT_BATCH = frozenset(("batch_norm", "instance_norm"))
# Their second result is made of lengths alone, the same on every path.
_PACKING = frozenset(("_pack_padded_sequence", "_pad_packed_sequence"))
_REAL, _IMAG = (getattr(torch.Tensor, name).__get__ for name in ("real", "imag"))
_READ_VALUES = frozenset(
    ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__", "equal")
) | frozenset(("allclose", "is_nonzero", "nonzero", "unique"))


class SampledVariable(RandomVariable):
    """Random variables held as 2p antithetic paths.

    Attributes:
        paths: (2p, *shape); path i and path p + i are driven by opposite noise.
    """

    precedence = 20
    chunks: Chunks
    whole: Tensor | None  # once asked for; what follows is made of the chunks all the same

    @classmethod
    def of_paths(cls, paths: Tensor | Chunks, settings: Settings) -> SampledVariable:
        """The variable whose paths these are, in one tensor or in several."""
        made = cls.__new__(cls)
        made._settings = settings
        made._latent = False
        made._origin = None
        made._identity = Identity()
        made.chunks = (paths,) if isinstance(paths, Tensor) else paths
        made.whole = None
        return made

    @property
    def paths(self) -> Tensor:
        """(2p, *shape): the values along each path."""
        if len(self.chunks) == 1:
            return self.chunks[0]
        if self.whole is None:
            self.whole = joined(self.chunks)
        return self.whole

    @property
    def mean(self) -> Tensor:
        """Mean across the paths, shaped like the variable; unbiased."""
        return self._paths_as_float().mean(0)

    def most_likely(self, dtype: torch.dtype) -> Tensor:
        """The commonest truth value or whole number among the paths."""
        return super().most_likely(dtype) if dtype == torch.bool else self.paths.mode(0).values.to(dtype)

    @property
    def var(self) -> Tensor:
        """Variance across the 2p paths.

        Within a pair, ((f+ - f-)/2)^2, the mean of which over pairs is unbiased for the odd part of the variance; and
        the spread of the pairs' centres. With the squared error of the mean it makes exactly the mean squared error
        over the paths. It lacks Var(mean), the even part's share / p.
        """
        values = self._paths_as_float()
        return squared(values - values.mean(0)).mean(0)

    def unbiased_var(self) -> Tensor:
        """Variance without what ``var`` lacks, of two pairs or more; paths that are drawn one by one have no odd part."""
        ahead, behind = self._paths_as_float().unflatten(0, (2, -1))
        if len(ahead) == 1:
            return self.var
        return squared((ahead - behind) / 2).mean(0) + ((ahead + behind) / 2).var(0)

    def _paths_as_float(self) -> Tensor:
        paths = self.paths
        return paths if paths.is_floating_point() or paths.is_complex() else paths.to(torch.get_default_dtype())

    real = property(lambda self: propagate(_REAL, (self,), {}))
    imag = property(lambda self: propagate(_IMAG, (self,), {}))

    _mean = property(lambda self: self.chunks[0][0])  # what is asked of shape, dtype and device, any path answers
    _var = property(lambda self: self.var)

    def with_moments(self, mean: Tensor, var: Tensor) -> RandomVariable:
        """Refused: mean and variance do not say where each path goes."""
        raise ConversionError(
            "a rule made a mean and a variance out of sampled paths; in covariance='sampled' plain functions run, no rules"
        )

    def apply(self, rule: Rule, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The plain function on every path."""
        name = getattr(func, "__name__", "")
        if isinstance(rule.kind, Read) or name in _READ_VALUES:
            raise ConversionError(
                f"{name} asks for the value of a random variable, which differs between its paths; take x.mean for "
                "its expected value, or leave that part of the model out of the conversion (methods=...)"
            )
        if isinstance(rule.kind, Collapse):
            return rule(func, args, kwargs)
        # (A declared approximate one, such as argsort, does depend on values.)
        if isinstance(rule.kind, Metadata) and rule.exactness is Exactness.EXACT and not is_in_place(func, kwargs):
            return func(*substitute(args, lambda x: x._mean), **substitute(kwargs, lambda x: x._mean))
        if rule.name == "setitem":
            func = setitem
        if func is torch.autograd.grad:
            return self.gradient(*args, **kwargs)
        if name == "requires_grad_":
            for chunk in self.chunks:
                chunk.requires_grad_(*args[1:], **kwargs)
            return self
        if name == "register_hook":
            handles = [chunk.register_hook(*args[1:]) for chunk in self.chunks if chunk.requires_grad]
            return handles[0] if handles else None
        settings = self.settings
        variables = {id(x): entering(x, settings) for x in random_variables(args, kwargs)}
        stacks, made = self.joined(list(variables.values()))  # type: ignore[arg-type]

        def plain(*paths: Tensor) -> Any:
            values = dict(zip(variables, paths, strict=True))
            if is_in_place(func, kwargs) and isinstance(args[0], RandomVariable):
                values[id(args[0])] = values[id(args[0])].clone()
            return func(
                *substitute(args, lambda x: values[id(x)]),
                **substitute(kwargs, lambda x: values[id(x)]),
            )

        if rule.name in _JOINT_BATCH and len(stacks) == 1:
            return made(_over_batch(rule.name, plain, alike(stacks)[0], args, kwargs))
        each = [_on_each(plain, paths) for paths in zip(*alike(stacks), strict=True)]
        if name in _PACKING:
            data, sizes = zip(*each, strict=True)
            return made(data), sizes[0][0]
        return _merged(each, made, lambda chunk: chunk.shape[1:])

    def gradient(self, outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> Any:
        """``torch.autograd.grad`` along each path: no path hangs on another, so it is the gradient of the sum over paths."""
        single = not isinstance(inputs, (list, tuple))
        of, by = ((x,) if isinstance(x, RandomVariable) else tuple(x) for x in (outputs, inputs))
        given = grad_outputs if isinstance(grad_outputs, (list, tuple)) else (grad_outputs,) * len(of)
        if not all(isinstance(x, SampledVariable) for x in by):
            raise ConversionError("autograd.grad of a random variable by a plain tensor differs between paths; take y.mean")
        weights = [_weights(x, g) for x, g in zip(of, given, strict=True)]
        values = [x.paths if isinstance(x, SampledVariable) else x for x in of]
        kept = {k: v for k, v in options.items() if k in ("retain_graph", "create_graph", "allow_unused", "materialize_grads")}
        found = iter(torch.autograd.grad(values, [chunk for x in by for chunk in x.chunks], weights, **kept))
        made = self.joined([x for x in by if isinstance(x, SampledVariable)])[1]
        chunks = [tuple(next(found) for _ in x.chunks) for x in by]
        results = tuple(None if each[0] is None else made(each) for each in chunks)
        return results[:1] if single else results

    def joined(self, variables: Sequence[SampledVariable]) -> tuple[list[Chunks], Callable[[Chunks], SampledVariable]]:
        """The variables' paths, and how a result is made of paths."""
        return [x.chunks for x in variables], lambda paths: SampledVariable.of_paths(paths, self.settings)


def squared(x: Tensor) -> Tensor:
    """The squared modulus, real also of a complex tensor."""
    return x.abs().square() if x.is_complex() else x.square()


def _weights(output: Any, given: Any) -> Tensor:
    """What a gradient of all paths of ``output`` is weighted with: 1, or what the caller gave for each path."""
    paths = output.paths if isinstance(output, SampledVariable) else output
    if isinstance(given, SampledVariable):
        return given.paths
    return torch.ones_like(paths) if given is None else given.expand_as(paths)


def _over_batch(name: str, plain: Callable[..., Any], chunks: Chunks, args: Any, kwargs: Any) -> Chunks:
    """A norm whose statistics over the batch are those of all paths."""
    if len(chunks) > 1 and name == "batch_norm":
        _, mean, var, weight, bias, training, momentum, eps = batch_norm_arguments(args, kwargs)
        if training or mean is None or var is None:
            return JointBatchNorm.apply(mean, var, weight, bias, momentum, eps, *chunks)  # type: ignore[no-any-return]
    elif len(chunks) > 1:
        chunks = (joined(chunks),)
    return tuple(plain(x.flatten(0, 1)).unflatten(0, (len(x), -1)) for x in chunks)


def _on_each(function: Callable[..., Any], stacks: Sequence[Tensor]) -> Any:
    """``function`` along the first dimension of ``stacks``: vectorised, or one by one where torch cannot.

    Returns what ``function`` returns, every tensor in it stacked along a new first dimension.

    Raises:
        ConversionError: ``function`` returns something other than a tensor that differs along the stack, or tensors of
            shapes that do.
    """
    try:
        return torch.vmap(function, randomness="different")(*stacks)
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        results = [function(*each) for each in zip(*(s.unbind(0) for s in stacks), strict=True)]  # a real error comes again
    return _merged(results, torch.stack, lambda x: x.shape)


def _merged(results: Sequence[Any], join: Callable[[Any], Any], shape: Callable[[Tensor], torch.Size]) -> Any:
    """One result of several that differ by their tensors, each set of which ``join`` makes one of."""
    leaves, structure = zip(*(_pytree.tree_flatten(each) for each in results), strict=True)
    merged = []
    for values in zip(*leaves, strict=True):
        if isinstance(values[0], Tensor):
            if len({shape(each) for each in values}) > 1:
                raise ConversionError(
                    "an operation gives a tensor whose shape depends on a random value (it selects where a random condition "
                    "holds), and paths must keep one shape; write it with torch.where(condition, a, b), which keeps them all"
                )
            merged.append(join(values))
        elif all(each == values[0] for each in values):
            merged.append(values[0])
        else:
            raise ConversionError(f"an operation gave {values[0]!r} on one path, {values[-1]!r} on another: not tensors")
    return _pytree.tree_unflatten(merged, structure[0])


def antithetic_normal(zeros: Tensor, settings: Settings) -> SampledVariable:
    """Standard normal variables shaped like ``zeros`` (first dimension: the batch) as antithetic paths."""
    generator = None
    if settings.seed is not None:
        generator = torch.Generator(zeros.device).manual_seed(settings.seed)
    noise = orthogonal_normal(settings.pairs, zeros, generator)
    return SampledVariable.of_paths(torch.cat((noise, -noise)), settings)


def orthogonal_normal(count: int, zeros: Tensor, generator: torch.Generator | None) -> Tensor:
    """(count, *shape): draws that are each standard normal and, within a sample, orthogonal in blocks.

    Directions are uniform on the sphere and lengths chi-distributed, so each draw by itself is N(0, I); a block holds as
    many as a sample has elements.
    """
    noise = torch.randn(count, *zeros.shape, dtype=zeros.dtype, device=zeros.device, generator=generator)
    elements = math.prod(zeros.shape[1:])
    if count == 1 or elements == 1 or zeros.numel() == 0:
        return noise
    blocks = []
    for block in noise.flatten(2).split(elements):  # (p, B, n)
        columns = block.permute(1, 2, 0).to(torch.promote_types(block.dtype, torch.float32))  # (B, n, p)
        directions, triangle = torch.linalg.qr(columns)
        directions = directions * torch.diagonal(triangle, dim1=-2, dim2=-1).sign().unsqueeze(-2)  # else not uniform
        other = torch.randn(columns.shape, dtype=columns.dtype, device=zeros.device, generator=generator)
        lengths = other.norm(dim=-2, keepdim=True)
        blocks.append((directions * lengths).permute(2, 0, 1).to(zeros.dtype))
    return torch.cat(blocks).reshape(noise.shape)


def independent_paths(sampler: Sampler, zeros: Tensor, settings: Settings) -> SampledVariable:
    """A variable whose 2p paths are drawn one by one, for a law without a quantile function."""
    return SampledVariable.of_paths(drawn_paths(sampler, 2 * settings.pairs, zeros, settings.seed), settings)


def drawn_paths(sampler: Sampler, count: int, zeros: Tensor, seed: int | None) -> Tensor:
    """(count, *shape) values of ``sampler``, fixed by a seed."""
    return sampler(count, None if seed is None else torch.Generator(zeros.device).manual_seed(seed))


MODES["sampled"] = Mode(antithetic_normal, drawn=independent_paths)
