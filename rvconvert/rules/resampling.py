"""Resampling: interpolation is a linear map, so its weights are squared on the variance (paper eqs 2 and 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvconvert.registry import Exactness
from rvconvert.rules.kinds import FixedLinear, Shape, add_rule, bind
from rvconvert.rules.pooling import _adaptive_average_square

_INTERPOLATE = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")


def _interpolate_square(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Separable: along each axis the matrix of weights is interpolate(identity), and its square acts on var."""
    values, _, _ = bind(_INTERPOLATE, args, kwargs)
    options = {k: v for k, v in zip(_INTERPOLATE[1:], values[1:], strict=True) if v is not None}
    var = values[0]
    mode = options.get("mode", "nearest")
    if mode.startswith("nearest"):
        return F.interpolate(var, **options)
    dims = var.ndim - 2
    target = F.interpolate(var[:1, :1], **options).shape[2:]
    if mode == "area":
        return _adaptive_average_square(getattr(F, f"adaptive_avg_pool{dims}d"), (var, tuple(target)), {})
    for axis in range(dims):
        weights = _axis_weights(var.shape[2 + axis], target[axis], axis, mode, options, var)
        var = torch.movedim(torch.movedim(var, 2 + axis, -1) @ weights.square().T, -1, 2 + axis)
    return var


def _axis_weights(length: int, target: int, axis: int, mode: str, options: dict[str, Any], like: Tensor) -> Tensor:
    """(target, length): the weights of interpolation along one axis."""
    eye = torch.eye(length, dtype=like.dtype, device=like.device).unsqueeze(1)
    scale = options.get("scale_factor")
    scale = scale[axis] if isinstance(scale, (tuple, list)) else scale
    shared = {k: options[k] for k in ("align_corners", "antialias") if k in options}
    one_dimensional = mode in ("linear", "trilinear")
    if one_dimensional:
        where: dict[str, Any] = {"scale_factor": scale} if scale is not None else {"size": target}
        if scale is not None:
            where["recompute_scale_factor"] = options.get("recompute_scale_factor")
        return F.interpolate(eye, mode="linear", **where, **shared).squeeze(1).T
    where = {"scale_factor": (scale, 1.0)} if scale is not None else {"size": (target, 1)}
    if scale is not None:
        where["recompute_scale_factor"] = options.get("recompute_scale_factor")
    return F.interpolate(eye.unsqueeze(-1), mode=mode, **where, **shared).flatten(1).T


add_rule(
    "interpolate",
    FixedLinear(_interpolate_square),
    Exactness.EXACT_IF_INDEPENDENT,
    "elements are independent",
    modules=(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    functions=(F.interpolate, F.upsample, F.upsample_nearest, F.upsample_bilinear),
)


def _unfold_is_selection(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return func(*args, **kwargs)


add_rule("im2col", Shape(), Exactness.EXACT, functions=(F.unfold,), modules=(nn.Unfold,))
add_rule(
    "col2im",
    FixedLinear(_unfold_is_selection),
    Exactness.EXACT_IF_INDEPENDENT,
    "elements are independent",
    functions=(F.fold,),
    modules=(nn.Fold,),
)
