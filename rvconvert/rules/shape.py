"""Operations that select, move or join elements, and questions about shape and type."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rvconvert.random_variable import RandomVariable, random_variables
from rvconvert.registry import Exactness
from rvconvert.rules.kinds import Composite, Metadata, Shape, add_rule

_QUESTIONS = (
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex element_size get_device "
    "storage_offset zeros_like ones_like empty_like full_like new_zeros new_ones new_empty "
    "new_full new_tensor new is_same_size result_type is_tensor is_pinned is_shared is_inference is_conj is_neg "
    "broadcast_shapes can_cast shape ndim dtype device layout requires_grad is_cuda is_leaf grad_fn "
    "is_signed is_set_to register_hook isnan isinf isfinite isreal"
).split()
add_rule("len", Metadata(), Exactness.EXACT, functions=(torch.Tensor.__len__, torch.Tensor.__format__, torch.Tensor.__repr__))
for _name in _QUESTIONS:
    add_rule(_name, Metadata(), Exactness.EXACT)

_VIEWS = (
    "view reshape view_as reshape_as flatten ravel unflatten squeeze unsqueeze permute transpose t movedim moveaxis "
    "swapaxes swapdims adjoint expand expand_as repeat tile repeat_interleave broadcast_to contiguous clone detach "
    "to float double half bfloat16 type type_as cuda cpu requires_grad_ retain_grad alias narrow select split "
    "split_with_sizes chunk tensor_split unsafe_chunk unsafe_split hsplit vsplit dsplit unbind unfold as_strided "
    "diagonal diag diag_embed triu tril flip fliplr flipud rot90 roll index_select take gather take_along_dim "
    "masked_select pixel_shuffle pixel_unshuffle channel_shuffle narrow_copy slice_scatter getitem pin_memory "
    "movedims atleast_1d atleast_2d atleast_3d view_as_real resolve_conj resolve_neg to_dense positive"
).split()
_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "flatten": (nn.Flatten,),
    "unflatten": (nn.Unflatten,),
    "pixel_shuffle": (nn.PixelShuffle,),
    "pixel_unshuffle": (nn.PixelUnshuffle,),
    "channel_shuffle": (nn.ChannelShuffle,),
}
for _name in _VIEWS:
    add_rule(_name, Shape(), Exactness.EXACT, modules=_MODULES.get(_name, ()), keeps_latent=True)

for _name in ("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack", "block_diag"):
    add_rule(_name, Shape(("tensors",), ("tensors",)), Exactness.EXACT, keeps_latent=True)


class _Variadic:
    """Functions of ``*tensors``: each result carries its own variance."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        like = random_variables(args, kwargs)[0]
        tensors = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
        means = func(*(x.mean if isinstance(x, RandomVariable) else x for x in tensors), **kwargs)
        vars_ = func(*(x.var if isinstance(x, RandomVariable) else torch.zeros_like(x) for x in tensors), **kwargs)
        random = [isinstance(x, RandomVariable) for x in tensors]
        return [like.with_moments(m, v) if r else m for m, v, r in zip(means, vars_, random, strict=True)]


add_rule("broadcast_tensors", _Variadic(), Exactness.EXACT, keeps_latent=True)

for _name, _names, _data in (
    ("pad", ("input", "pad", "mode", "value"), ("input", "value")),
    ("constant_pad_nd", ("input", "pad", "value"), ("input", "value")),
    ("masked_fill", ("input", "mask", "value"), ("input", "value")),
    ("masked_scatter", ("input", "mask", "source"), ("input", "source")),
    ("index_fill", ("input", "dim", "index", "value"), ("input", "value")),
    ("index_copy", ("input", "dim", "index", "source"), ("input", "source")),
    ("scatter", ("input", "dim", "index", "src"), ("input", "src")),
    ("select_scatter", ("input", "src"), ("input", "src")),
    ("index_put", ("input", "indices", "values"), ("input", "values")),
):
    add_rule(_name, Shape(_names, _data), Exactness.EXACT)


def setitem(input: Any, index: Any, value: Any) -> Any:
    """``input[index] = value`` as a function: a new tensor or random variable, ``input`` unchanged."""
    likes = random_variables(input, value)

    def write(target: torch.Tensor, source: Any) -> torch.Tensor:
        target = target.clone()
        target[index] = source
        return target

    if not likes:
        return write(input, value)
    carrier = max(likes, key=lambda x: x.precedence)
    if carrier.precedence:  # another covariance mode applies the plain function as it applies any
        return carrier.apply(SETITEM, setitem, (input, index, value), {})

    def part(x: Any, which: str) -> Any:
        if isinstance(x, RandomVariable):
            return getattr(x, which)
        if which == "mean":
            return x
        return torch.zeros_like(x) if isinstance(x, torch.Tensor) else 0.0

    return likes[0].with_moments(
        write(part(input, "mean"), part(value, "mean")), write(part(input, "var"), part(value, "var"))
    )


SETITEM = add_rule("setitem", Composite(setitem), Exactness.EXACT)


def _copy(input: Any, source: Any, non_blocking: bool = False) -> Any:
    source = source if isinstance(source, RandomVariable) else torch.as_tensor(source)
    return source.expand(input.shape).to(input.dtype)


add_rule("copy_", Composite(_copy), Exactness.EXACT, functions=(torch.Tensor.copy_, torch.Tensor.set_))


def _fill(input: Any, value: Any) -> Any:
    return torch.full_like(input, value) if not isinstance(value, RandomVariable) else value.expand(input.shape)


add_rule("fill", Composite(_fill), Exactness.EXACT)
add_rule("zero_", Metadata(), Exactness.EXACT, functions=(torch.Tensor.zero_, torch.zero_))
