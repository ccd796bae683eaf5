"""Resampling: interpolation is a linear map, so its weights are squared on the variance (paper eqs 2 and 3)."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.registry import Exactness
from rvconvert.rules.calls import bind, moments
from rvconvert.rules.kinds import Composite, FixedLinear, add_rule, same_map
from rvconvert.rules.linearize import LINEARIZED
from rvconvert.rules.pooling import adaptive_average_square

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
        return adaptive_average_square(getattr(F, f"adaptive_avg_pool{dims}d"), (var, tuple(target)), {})
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
    where = {"scale_factor": (scale, 1.0)} if scale is not None else {"size": (target, 2)}
    if scale is not None:
        where["recompute_scale_factor"] = options.get("recompute_scale_factor")
    # Two equal columns: on an image one pixel wide, torch's antialiasing takes rows for columns.
    columns = torch.stack((eye, eye), -1)
    return F.interpolate(columns, mode=mode, **where, **shared)[..., 0].flatten(1).T


add_rule(
    "interpolate",
    FixedLinear(_interpolate_square),
    Exactness.EXACT_IF_INDEPENDENT,
    "elements are independent",
    modules=(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    functions=(F.interpolate, F.upsample, F.upsample_nearest, F.upsample_bilinear),
)


add_rule("fold", FixedLinear(same_map), Exactness.EXACT_IF_INDEPENDENT, "elements are independent", modules=(nn.Fold,))


def _axis_positions(position: Tensor, size: int, align_corners: bool, padding_mode: str) -> Tensor:
    """Grid coordinates in [-1, 1] as positions on an axis of ``size`` elements."""
    position = (position + 1) / 2 * (size - 1) if align_corners else ((position + 1) * size - 1) / 2
    if padding_mode == "border":
        return position.clamp(0, size - 1)
    if padding_mode == "reflection":
        low, span = (0.0, size - 1.0) if align_corners else (-0.5, float(size))
        if span == 0:
            return torch.zeros_like(position)
        folded = torch.remainder(position - low, 2 * span)
        return (torch.minimum(folded, 2 * span - folded) + low).clamp(0, size - 1)
    return position


def _grid_sample(
    input: Any, grid: Any, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool | None = None
) -> Any:
    """A weighted sum of the 2^d elements around each point of a constant grid (of one, where mode is nearest)."""
    if isinstance(grid, RandomVariable):
        return _over_grid(input, grid, mode, padding_mode, align_corners)
    if not isinstance(input, RandomVariable):
        return F.grid_sample(input, grid, mode, padding_mode, align_corners)
    if mode == "bicubic":
        return LINEARIZED.kind(F.grid_sample, (input, grid, mode, padding_mode, align_corners), {})
    mean = F.grid_sample(input.mean, grid, mode, padding_mode, align_corners)
    sizes = input.shape[2:]
    # The last axis of the grid runs from the last axis of the input to the first.
    at = [_axis_positions(grid[..., -1 - axis], size, bool(align_corners), padding_mode) for axis, size in enumerate(sizes)]
    if mode == "nearest":
        return input.with_moments(mean, _gathered(input.var, [torch.round(x) for x in at]))
    low = [torch.floor(x) for x in at]
    var = torch.zeros_like(mean)
    for corner in itertools.product((0, 1), repeat=len(sizes)):
        places = [x + step for x, step in zip(low, corner, strict=True)]
        weight = torch.ones_like(at[0])
        for x, place in zip(at, places, strict=True):
            weight = weight * (1 - (x - place).abs())
        var = var + _gathered(input.var, places) * weight.square().unsqueeze(1)
    return input.with_moments(mean, var)


def _over_grid(input: Any, grid: RandomVariable, *options: Any) -> RandomVariable:
    """Cubature over the d coordinates of each point, at sqrt(d) deviations along each: exact where the image is linear there."""
    axes = grid.shape[-1]
    reach = (axes * grid.var.clamp(min=1e-20)).sqrt()  # whose gradient is finite
    share = (grid.var / reach.square()).movedim(-1, 0).unsqueeze(2)
    mean: Any = 0.0
    var: Any = 0.0
    for along, part in zip(torch.eye(axes, dtype=reach.dtype, device=reach.device), share, strict=True):
        ends = [moments(_grid_sample(input, grid.mean + sign * reach * along, *options)) for sign in (1, -1)]
        (ahead, ahead_var), (behind, behind_var) = ends
        mean = mean + (ahead + behind) / (2 * axes)
        var = var + part * ((ahead - behind) / 2).square()
        if ahead_var is not None:
            var = var + (ahead_var + behind_var) / (2 * axes)
    return grid.with_moments(mean, var)


def _gathered(x: Tensor, places: list[Tensor]) -> Tensor:
    """(N, C, *out): the elements of ``x`` at integral places of each sample; 0 outside."""
    inside = torch.ones_like(places[0], dtype=torch.bool)
    flat = torch.zeros_like(places[0], dtype=torch.long)
    for place, size in zip(places, x.shape[2:], strict=True):
        inside = inside & (place >= 0) & (place <= size - 1)
        flat = flat * size + place.clamp(0, size - 1).long()
    index = flat.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
    found = x.flatten(2).gather(2, index).reshape(x.shape[0], x.shape[1], *flat.shape[1:])
    return found * inside.unsqueeze(1)


add_rule(
    "grid_sample",
    Composite(_grid_sample),
    Exactness.EXACT_IF_INDEPENDENT,
    "elements are independent and the grid constant; over a random grid by cubature, bicubic weights linearised at the mean",
)
