"""Why a method cannot be converted, and the next line to type."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from rvconvert.errors import ConversionError, NonGaussianError, NoReparameterizationError, TracingError
from rvconvert.places import short_place
from rvconvert.program.latents import is_named
from rvconvert.rules.kinds import value_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx, nn

    from rvconvert.capture.recording import Recording
    from rvconvert.options import Options
    from rvconvert.program.roles import Roles

_SUGGESTED = 4  # methods that a refusal names
_DRAWING = frozenset("randn randn_like normal normal_ rsample sample".split())


def refusal(
    recording: Recording, roles: Roles, options: Options, plain_class: type[nn.Module], name: str, method: Callable[..., Any]
) -> ConversionError | None:
    """Why a method cannot be converted, whatever rules there are; None if it can.

    Args:
        recording, roles: of the method.
        options: of the conversion.
        plain_class: of the model, before it was converted.
        name, method: of the method; the plain one, bound.
    """
    label = f"{plain_class.__name__}.{name}"
    for node, place, decides in recording.reads:
        if node in roles.random and decides:
            return read_refusal(label, place)
    for writer, place in recording.stale:
        if writer in roles.random:
            return TracingError(
                f"{label}: in-place write through a view at {short_place(writer.meta['where'])}: {writer.meta['source']}\n"
                f"  then its base is used: {place}\n"
                "  write out of place, y = torch.relu(y) for y.relu_(), y = torch.where(mask, value, y) for y[0][mask] = value, "
                "or use the view's result alone"
            )
    others = [n for n in roles.latents if not n.meta["draw"].can_be_latent]
    if others:
        found = [f"  {short_place(n.meta['where'])}: {n.meta['source']}\n    {n.meta['draw'].law.refusal}" for n in others]
        found = list(dict.fromkeys(found))  # a line of a loop is one
        return NonGaussianError("\n".join([f"{label}: a latent is drawn from a law that has no random variable:", *found]))
    unknown = [name for name in options.latent if not any(is_named(draw, name) for draw in recording.draws)]
    if unknown and recording.draws and len(options.methods) == 1:
        places = ", ".join(dict.fromkeys(short_place(str(n.meta["where"])) for n in recording.draws))
        return ConversionError(f"{label}: latent={', '.join(map(repr, unknown))} names no draw in it; it draws at {places}")
    given = bool(recording.random_inputs or options.random_inputs)
    if given or roles.reconstructions or any(n in roles.random for n in recording.output.all_input_nodes):
        return None
    return _nothing_to_convert(recording, options, plain_class, name, method)


def _nothing_to_convert(
    recording: Recording, options: Options, plain_class: type[nn.Module], name: str, method: Callable[..., Any]
) -> NoReparameterizationError:
    """The refusal of a method whose result depends on no latent."""
    model: nn.Module = method.__self__  # type: ignore[attr-defined]
    reason = "no draw from a Gaussian was found in it"
    by_python = any(why.startswith("Python draws") for why in recording.once)
    # Where NumPy has worked on a draw of its own, what torch drew in its place has no use.
    drawn = [short_place(str(n.meta["where"])) for n in recording.draws if n.users or not by_python]
    if drawn:
        places = ", ".join(dict.fromkeys(drawn))
        reason = f"the draw at {places} is no latent: no decoder's value depends on it, or no input places it"
    elif by_python:
        reason += ", but Python or numpy draws in it, whose numbers no graph holds: draw by torch.randn_like(mu)"
    elif discrete := [short_place(str(n.meta["where"])) for n in recording.graph.nodes if _chooses(n)]:
        reason += f"; it picks by argmin or argmax, as vector quantization does, at {discrete[0]}"
    elif any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        reason += ", and a scripted module in it has no Python to look into: use the nn.Module that it was made of"
    own = {} if plain_class.__module__.startswith("torch.") else vars(plain_class)
    functions = [m for m, held in own.items() if inspect.isfunction(held)]  # no static ones, which have no layers
    parts = _reached(plain_class, name) if inspect.isfunction(inspect.unwrap(getattr(plain_class, name))) else set()
    others = [m for m in functions if m[0] != "_" and m != name and m not in parts]
    reached = {m: _reached(plain_class, m) for m in others}
    # Those that draw, and of these the ones that go on from there: a loss, not the reparameterization.
    others = sorted((m for m in others if _DRAWING & reached[m]), key=lambda m: -len(reached[m] & set(functions))) or others
    advice = [f"    rvconvert.convert(model, methods=({other!r},))" for other in others[:_SUGGESTED]]
    if drawn and not options.latent:
        methods = "" if name == "forward" else f"methods=({name!r},), "
        named = f"    rvconvert.convert(model, {methods}latent=({drawn[0].rpartition('/')[2]!r},))"
        advice.insert(0 if methods else len(advice), named)  # another method was tried already
    for path, module in model.named_modules():
        if _is_decoder(path, module) and not isinstance(module, torch.jit.ScriptModule):
            argument, what = _first_argument(module), f"model.{path}" if path else "model"
            advice.append(f"    rvconvert.convert({what}, random_inputs=({argument!r},))  # a bare decoder")
            break
    if noise := _noise_among(recording, method):
        advice.insert(0, f"    rvconvert.convert(model, random_inputs=({noise!r},))  # where it is noise")
    if not advice:
        advice = [f"    rvconvert.convert(model, random_inputs=({_first_argument(model)!r},))  # if it is a decoder"]
    what = f"{plain_class.__name__}.{name}: nothing to convert, {reason}"
    return NoReparameterizationError(
        "\n".join([f"{what}. What encodes, samples and decodes is converted, or a decoder alone:", *advice])
    )


def _reached(plain_class: type[nn.Module], method: str) -> set[str]:
    """The names that a method's code mentions, and that of the class's other methods where it mentions these."""
    todo, found = [method], set[str]()
    while todo:
        function = inspect.unwrap(getattr(plain_class, todo.pop()))
        names = set(getattr(getattr(function, "__code__", None), "co_names", ())) - found
        found |= names
        todo += [n for n in names if inspect.isfunction(getattr(plain_class, n, None))]
    return found


def _noise_among(recording: Recording, method: Callable[..., Any]) -> str | None:
    """The argument that scales or is scaled by something made of another one, as noise that a caller draws is."""
    placeholders = [n for n in recording.graph.nodes if n.op == "placeholder" and "number" not in n.meta]
    names = [*inspect.signature(method).parameters]
    for node, argument in zip(placeholders[1:], names[1:], strict=False):
        products = [u for u in node.users if (rule := u.meta.get("rule")) is not None and rule.name in ("mul", "addcmul")]
        if any(other.op not in ("placeholder", "get_attr") for u in products for other in u.all_input_nodes):
            return argument
    return None


def read_refusal(label: str, place: str) -> ConversionError:
    """Of a method in which Python decides by the value of a random variable."""
    return value_error(f"{label}: {place}")


def _chooses(node: fx.Node) -> bool:
    rule = node.meta.get("rule")
    return rule is not None and rule.name in ("argmin", "argmax")


def _is_decoder(path: str, module: nn.Module) -> bool:
    """By its name; the model itself, of no path, by that of its class or of what it takes."""
    if path:
        return any(part in path.rpartition(".")[2].lower() for part in ("dec", "gen"))
    name = type(module).__name__.lower()
    named = ("decoder" in name and "encoder" not in name) or "generator" in name
    return named or _first_argument(module) in ("z", "latent", "latents", "noise", "eps")


def _first_argument(module: nn.Module) -> str:
    return [*inspect.signature(type(module).forward).parameters, "input"][1]
