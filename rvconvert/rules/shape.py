"""Operations that select, move or join elements, and questions about shape and type."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rvconvert.core.random_variable import RandomVariable, random_variables
from rvconvert.core.registry import Exactness
from rvconvert.errors import UnsupportedOperationError
from rvconvert.rules.kinds import Composite, Metadata, Read, Shape, add_rule, picking

_QUESTIONS = (
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex element_size get_device "
    "storage_offset zeros_like ones_like empty_like full_like new_zeros new_ones new_empty "
    "new_full new_tensor new is_same_size result_type is_tensor is_pinned is_shared is_inference is_conj is_neg "
    "broadcast_shapes can_cast shape ndim dtype device layout requires_grad is_cuda is_leaf grad_fn "
    "is_signed is_set_to isnan isinf isfinite isreal is_nested is_sparse is_quantized is_cpu is_meta is_mps "
    "is_mkldnn is_sparse_csr itemsize nbytes output_nr retains_grad _nested_tensor_from_mask_left_aligned"
).split()
add_rule("len", Metadata(), Exactness.EXACT, functions=(torch.Tensor.__len__, torch.Tensor.__format__, torch.Tensor.__repr__))


_READS = (
    "item tolist numpy equal allclose is_nonzero nonzero nonzero_static argwhere unique unique_consecutive bincount histc "
    "__bool__ __int__ __float__ __index__ __complex__ __array__ __contains__"
).split()
for _name in _READS:
    add_rule(_name, Read(), Exactness.EXACT)


def _requires_grad(input: Any, requires_grad: bool = True) -> Any:
    input.mean.requires_grad_(requires_grad)
    return input


def _retain_grad(input: Any) -> None:
    input.mean.retain_grad()


def _register_hook(input: Any, hook: Any) -> Any:
    """The gradient of the mean and that of the variance pass through the hook, which scales both or stops both."""
    handles = [x.register_hook(hook) for x in (input.mean, input.var) if x.requires_grad]
    return handles[0] if handles else None


add_rule("requires_grad_", Composite(_requires_grad), Exactness.EXACT, functions=(torch.Tensor.requires_grad_,))
add_rule("retain_grad", Composite(_retain_grad), Exactness.EXACT)
add_rule("register_hook", Composite(_register_hook), Exactness.APPROXIMATE, "the hook scales a gradient")
for _name in _QUESTIONS:
    add_rule(_name, Metadata(), Exactness.EXACT)

_VIEWS = (
    "view reshape view_as reshape_as flatten ravel unflatten squeeze unsqueeze permute transpose t movedim moveaxis "
    "swapaxes swapdims adjoint expand expand_as repeat tile repeat_interleave broadcast_to contiguous clone detach "
    "float double half bfloat16 cuda cpu narrow select split "
    "split_with_sizes chunk tensor_split unsafe_chunk unsafe_split hsplit vsplit dsplit unbind unfold "
    "diagonal diag diag_embed triu tril flip fliplr flipud rot90 roll index_select take gather take_along_dim "
    "masked_select pixel_shuffle pixel_unshuffle channel_shuffle narrow_copy slice_scatter getitem pin_memory "
    "T mT H mH real data atleast_1d atleast_2d atleast_3d resolve_conj resolve_neg to_dense positive"
).split()
_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "flatten": (nn.Flatten,),
    "unfold": (nn.Unfold,),
    "unflatten": (nn.Unflatten,),
    "pixel_shuffle": (nn.PixelShuffle,),
    "pixel_unshuffle": (nn.PixelUnshuffle,),
    "channel_shuffle": (nn.ChannelShuffle,),
}
_SAME = frozenset("contiguous clone detach positive real data".split())
for _name in _VIEWS:
    add_rule(_name, Shape(same=_name in _SAME), Exactness.EXACT, modules=_MODULES.get(_name, ()), keeps_latent=True)


def _whole(x: RandomVariable, dtype: torch.dtype) -> Any:
    """Whole numbers, a picture's or a category's: those at the mean of what ``x`` is a function of."""
    if x.settings.strict:
        raise UnsupportedOperationError(
            f"{dtype} of a random variable differs with each draw; without strict=True it is that of the mean, and "
            'covariance="sampled" makes it on each path'
        )
    with torch.no_grad():
        value = x.mean if x.origin is None else x.origin.function(x.origin.parent.mean)
    if dtype == torch.bool:
        return x if value.dtype == torch.bool else torch.ne(x, 0)  # type: ignore[call-overload]
    return value.to(dtype)


class _Cast(Shape):
    """To another type or device."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().__call__(func, args, kwargs)
        whole = isinstance(result, torch.Tensor) and isinstance(args[0], RandomVariable)
        return _whole(args[0], result.dtype) if whole else result


for _name in ("to", "type", "type_as"):
    add_rule(_name, _Cast(), Exactness.EXACT, keeps_latent=True)


def _whole_as(dtype: torch.dtype) -> Any:
    def body(input: Any, memory_format: Any = None) -> Any:
        return _whole(input, dtype)

    return body


_WHOLE = {
    "bool": torch.bool,
    "byte": torch.uint8,
    "char": torch.int8,
    "short": torch.int16,
    "int": torch.int32,
    "long": torch.int64,
}
for _name, _dtype in _WHOLE.items():
    add_rule(_name, Composite(_whole_as(_dtype)), Exactness.APPROXIMATE, "whole numbers are those of the mean")

for _name in ("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack"):
    add_rule(_name, Shape(("tensors",), ("tensors",)), Exactness.EXACT, keeps_latent=True)


def _broadcast_tensors(*tensors: Any) -> Any:
    """Each result carries its own variance; a plain tensor stays plain."""
    each = list(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)) else list(tensors)
    shape = torch.broadcast_shapes(*(x.shape for x in each))
    return [x.expand(shape) for x in each]


def _block_diag(*tensors: Any) -> Any:
    return Shape(("tensors",), ("tensors",))(lambda parts: torch.block_diag(*parts), (tensors,), {})


add_rule("broadcast_tensors", Composite(_broadcast_tensors), Exactness.EXACT, keeps_latent=True)
add_rule("block_diag", Composite(_block_diag), Exactness.EXACT, keeps_latent=True)

for _name, _names, _data in (
    ("pad", ("input", "pad", "mode", "value"), ("input", "value")),
    ("constant_pad_nd", ("input", "pad", "value"), ("input", "value")),
    ("scatter_add", ("input", "dim", "index", "src"), ("input", "src")),
    ("masked_scatter", ("input", "mask", "source"), ("input", "source")),
    ("index_fill", ("input", "dim", "index", "value"), ("input", "value")),
    ("index_copy", ("input", "dim", "index", "source"), ("input", "source")),
    ("select_scatter", ("input", "src"), ("input", "src")),
    ("index_put", ("input", "indices", "values"), ("input", "values")),
):
    add_rule(_name, Shape(_names, _data), Exactness.EXACT)


def _masked_fill(input: Any, mask: Any, value: Any) -> Any:
    if isinstance(mask, RandomVariable):
        return torch.where(mask, torch.as_tensor(value, dtype=input.dtype, device=input.device), input)  # type: ignore[call-overload]
    return Shape(("input", "mask", "value"), ("input", "value"))(torch.masked_fill, (input, mask, value), {})


add_rule("masked_fill", Composite(_masked_fill), Exactness.EXACT, "a mask that is random is independent of what it fills")


def _scatter(input: Any, dim: int, index: Any, src: Any = None, *, value: Any = None, reduce: Any = None) -> Any:
    if reduce is not None:
        raise UnsupportedOperationError(f"scatter with reduce={reduce!r} has no rule; scatter_add has one")
    kind = Shape(("input", "dim", "index", "src"), ("input", "src"))
    return kind(torch.scatter, (input, dim, index, value if src is None else src), {})


def _index_add(input: Any, dim: int, index: Any, source: Any, *, alpha: float = 1) -> Any:
    kind = Shape(("input", "dim", "index", "source"), ("input", "source"))
    return kind(torch.index_add, (input, dim, index, source if alpha == 1 else source * alpha), {})


add_rule("scatter", Composite(_scatter), Exactness.EXACT)
add_rule("index_add", Composite(_index_add), Exactness.EXACT_IF_INDEPENDENT, "operands are independent")


def setitem(input: Any, index: Any, value: Any) -> Any:
    """``input[index] = value`` as a function: a new tensor or random variable, ``input`` unchanged."""
    if random_variables(index):  # an indicator, x > 0: each element is written with its probability
        if isinstance(index, RandomVariable) and index.shape == input.shape and bool(index.var.any()):
            return torch.where(index, value, input)  # type: ignore[call-overload]
        index = picking(index, "written")
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

    return likes[0].with_moments(write(part(input, "mean"), part(value, "mean")), write(part(input, "var"), part(value, "var")))


SETITEM = add_rule("setitem", Composite(setitem), Exactness.EXACT)


def _copy(input: Any, source: Any, non_blocking: bool = False) -> Any:
    if random_variables(source):
        return source.expand(input.shape).to(input.dtype)
    mean = torch.as_tensor(source, device=input.device).expand(input.shape).to(input.dtype, copy=True)
    return input.with_moments(mean, torch.zeros_like(mean))


add_rule("copy_", Composite(_copy), Exactness.EXACT, functions=(torch.Tensor.copy_,))


def _fill(input: Any, value: Any = 0.0) -> Any:
    if random_variables(value):
        return value.expand(input.shape).to(input.dtype)
    mean = torch.full_like(input.mean, value) if isinstance(value, (int, float)) else value.expand(input.shape)
    return input.with_moments(mean.to(input.dtype), torch.zeros_like(input.var))


add_rule("fill", Composite(_fill), Exactness.EXACT)
add_rule("zero_", Composite(_fill), Exactness.EXACT, functions=(torch.Tensor.zero_, torch.zero_))
