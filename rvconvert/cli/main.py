"""The command line: demo, plan, convert, transfer, export, verify, calibrate, rules. Exit 0 done, 1 refused, 2 usage."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rvconvert import render
from rvconvert._convert import convert, plan
from rvconvert.cli.calibrate import add_arguments, run_calibrate
from rvconvert.cli.images import read_images
from rvconvert.converted import conversion_of
from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.registry import REGISTRY
from rvconvert.errors import ConversionError, TransferError
from rvconvert.files import checkpoint
from rvconvert.files.export import SUFFIXES, export
from rvconvert.files.recipe import Recipe, construct, import_class, library_version
from rvconvert.options import Options
from rvconvert.plain import transfer_weights
from rvconvert.verify import verify

__all__ = ["main"]

MODEL = "package.module:Class or path/file.py:Class"
FROM_CHECKPOINT = "from-checkpoint"
CHECKPOINT = ".pt, .pth, .ckpt or .safetensors"
Result = tuple[dict[str, Any], Sequence[Any], int]  # data for --json, renderables for people, exit code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        options = [option for action in args.parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
        args.parser.error(f"unrecognized argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
    try:
        data, shown, code = args.command(args)
        if args.json:
            print(json.dumps(_finite(data), indent=2, allow_nan=False))
        else:
            render.show(*shown)
        sys.stdout.flush()
    except ConversionError as error:
        if args.traceback:
            raise
        render.show_error(str(error))
        return 1
    except KeyboardInterrupt:
        render.show_error("interrupted")
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


# --- commands -----------------------------------------------------------------------------------------


def run_demo(args: argparse.Namespace) -> Result:
    try:
        from rvconvert.cli.demo import run
    except ImportError as error:
        raise ConversionError(f"the demo needs {error.name}: pip install 'rvconvert[demo]'") from None
    options = {name: getattr(args, name) for name in ("epochs", "quick", "seed", "force", "truth")}
    data = run(Path(args.out), **options)
    return data.to_dict(), [data.table(), data.explanation()], 0


def run_plan(args: argparse.Namespace) -> Result:
    source = checkpoint.read(args.checkpoint, allow_pickle=args.allow_pickle, key=args.key) if args.checkpoint else None
    model = _model(args, source)
    notes = _fill(model, source, args) if source else []
    examples = _given_examples(args)
    report = _guarded(args, lambda: plan(model, example_inputs=examples, **_options(args)))
    shown = [render.report_table(report), *(f"note: {n}" for n in notes)]
    return report.to_dict(), shown, 1 if report.unsupported or report.refusal else 0


def run_convert(args: argparse.Namespace) -> Result:
    checkpoint.check_destination(args.out, force=args.force)
    source = checkpoint.read(args.source, allow_pickle=args.allow_pickle, key=args.key)
    if source.recipe is not None:
        raise ConversionError(
            f"{args.source} holds a converted model already; take its plain weights first: rvconvert transfer {args.source} OUT"
        )
    model = _model(args, source)
    notes = _fill(model, source, args)
    examples = _examples(args)
    made = _guarded(args, lambda: convert(model, example_inputs=examples, inplace=True, **_options(args)))
    if examples is None:
        notes.append("not tried on an input yet: give --example-shape to have every operation checked now")
    checkpoint.write(made.state_dict(), args.out, recipe=Recipe.of(made, args.model, args.kwargs), force=args.force)
    data = {
        "model": args.model,
        "checkpoint": str(args.source),
        "out": str(args.out),
        "entries": len(made.state_dict()),
        "parameters": sum(p.numel() for p in made.parameters()),
        "options": Recipe.of(made).options,
        "notes": notes,
    }
    text = f"{args.out}: {type(model).__name__}, {data['entries']} entries, {data['parameters']:,} parameters, converted"
    shapes = [f"--example-shape {_spelled(shape, dtype)}" for shape, dtype in args.example_shape or ()]
    next_step = f"next: rvconvert verify {args.out} --model {args.model} {' '.join(shapes) or '--images PATH'}"
    return data, [text, *(f"note: {n}" for n in notes), next_step], 0


def run_transfer(args: argparse.Namespace) -> Result:
    checkpoint.check_destination(args.out, force=args.force)
    source = checkpoint.read(args.source, allow_pickle=args.allow_pickle)
    if source.recipe is None:
        raise ConversionError(f"{args.source} holds plain weights already: there is nothing to transfer")
    checked = None
    if args.model:
        args.kwargs = source.recipe.kwargs if args.kwargs is None else args.kwargs
        transfer_weights(source.state, _model(args))
        checked = args.model
    checkpoint.write(source.state, args.out, force=args.force)
    data = {
        "checkpoint": str(args.source),
        "out": str(args.out),
        "entries": len(source.state),
        "checked": checked,
    }
    name = source.recipe.model.rpartition(":")[2]
    loading = "safetensors.torch.load_file" if Path(args.out).suffix == checkpoint.SAFETENSORS else "torch.load"
    text = f"{args.out}: plain weights, {data['entries']} entries" + (f", fit {checked}" if checked else "")
    return data, [text, f"next: {name}(...).load_state_dict({loading}({str(args.out)!r}))"], 0


def run_export(args: argparse.Namespace) -> Result:
    checkpoint.check_destination(args.out, force=args.force, suffixes=SUFFIXES)
    notes: list[str] = []
    if args.checkpoint:
        source = checkpoint.read(args.checkpoint, allow_pickle=args.allow_pickle, key=args.key)
        if source.recipe is not None:
            model = checkpoint.build(source, model=args.model, kwargs=_of_the_file(args))
        else:
            model = _model(args, source)
            notes = _fill(model, source, args)
    else:
        model = _model(args)
        notes.append("random weights: give --checkpoint for trained ones")
    examples = _given_examples(args)
    options = {"deviation": args.deviation, "method": args.method, "force": args.force}
    options |= {name: value for name in _OF_DEVIATIONS if (value := getattr(args, name)) is not None}
    _guarded(args, lambda: export(model, args.out, examples, **options))
    what = "deterministic, with the deviation of every pixel" if args.deviation else "deterministic"
    data = {"model": args.model, "out": str(args.out), "method": args.method, "deviation": args.deviation, "notes": notes}
    return data, [f"{args.out}: {type(model).__name__}.{args.method}, {what}", *(f"note: {n}" for n in notes)], 0


def _run_calibrate(args: argparse.Namespace) -> Result:
    args.kwargs = _of_the_file(args)
    return run_calibrate(args)


def run_verify(args: argparse.Namespace) -> Result:
    if args.plot:
        checkpoint.check_destination(args.plot, force=args.force, suffixes=(".png", ".svg", ".pdf"))
    model = checkpoint.load(
        args.source,
        model=args.model,
        kwargs=_of_the_file(args),
        trust_recipe=args.trust_recipe,
        allow_pickle=args.allow_pickle,
    ).eval()
    if args.images:
        low, high = args.range
        inputs: Any = (read_images(args.images, count=args.count, size=args.size) * (high - low) + low,)
    else:
        inputs = _given_examples(args, "--images PATH or ")
    inputs = _dressed(model, inputs, args.method)
    result = _guarded(args, lambda: verify(model, *inputs, samples=args.samples, seed=args.seed, method=args.method))
    if args.plot:
        result.plot(args.plot)
    return result.to_dict(), [str(result), *([f"Plot: {args.plot}"] if args.plot else [])], 0


def run_rules(args: argparse.Namespace) -> Result:
    wanted = (args.filter or "").lower()
    rules = [r for r in REGISTRY if wanted in " ".join([r.name, *(m.__name__ for m in r.modules)]).lower()]
    if not rules:
        raise ConversionError(f"no rule for {args.filter!r}; rvconvert rules lists all; @rvconvert.rule adds one")
    data = [
        {
            "operation": r.name,
            "modules": [m.__name__ for m in r.modules],
            "exactness": r.exactness.value,
            "assumption": r.assumption,
        }
        for r in rules
    ]
    return {"rules": data}, [render.rules_table(rules)], 0


# --- what commands share ------------------------------------------------------------------------------


def _model(args: argparse.Namespace, source: checkpoint.Checkpoint | None = None) -> nn.Module:
    """The model that the arguments name; where they ask for it, or give none, with the arguments that Lightning saved."""
    cls = import_class(args.model)
    if args.kwargs == FROM_CHECKPOINT and (source is None or not source.hyper_parameters):
        what = "there is no checkpoint" if source is None else f"{source.path} holds none"
        raise ConversionError(f"--kwargs {FROM_CHECKPOINT} takes Lightning's hyper_parameters, and {what}: give them as JSON")
    if args.kwargs in (None, FROM_CHECKPOINT):
        args.kwargs = checkpoint.constructor_arguments(source, cls) if source is not None and source.hyper_parameters else None
    return construct(cls, args.kwargs)


def _fill(model: nn.Module, source: checkpoint.Checkpoint, args: argparse.Namespace) -> list[str]:
    """Load a plain checkpoint into the model; returns what a person should know about it."""
    try:
        notes = checkpoint.load_weights(model, source, args.prefix)
    except TransferError as error:
        raise TransferError(f"{error}\nThese are weights of another model{_other_arguments(type(model))}") from None
    if source.hyper_parameters and args.kwargs:
        notes.append(f"constructed with {args.kwargs}")
    return notes


def _other_arguments(cls: type[nn.Module]) -> str:
    """What to type for a model constructed with other numbers, if its class takes any."""
    parameters = [*inspect.signature(cls.__init__).parameters.values()][1:]
    numbers = [p for p in parameters if p.annotation in (int, "int") or type(p.default) is int] or parameters
    if not numbers:
        return ""
    value = numbers[0].default if type(numbers[0].default) is int else 32
    return f", or of {cls.__name__} constructed with other arguments: --kwargs '{{\"{numbers[0].name}\": {value}}}', with theirs"


def _examples(args: argparse.Namespace) -> tuple[torch.Tensor, ...] | None:
    """Random inputs of the shapes that were asked for: uniform in [0, 1), zeros where they are integers."""
    if not args.example_shape:
        return None
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape, dtype in args.example_shape:
        if dtype.is_floating_point:
            made.append(torch.rand(shape, generator=generator, dtype=dtype))
        else:
            made.append(torch.zeros(shape, dtype=dtype))
    return tuple(made)


def _given_examples(args: argparse.Namespace, or_else: str = "") -> tuple[torch.Tensor, ...]:
    """The same where there must be some; ``or_else``: what else would do."""
    examples = _examples(args)
    if examples is None:
        raise ConversionError(f"nothing to run the model on: give {or_else}--example-shape N,C,H,W")
    return examples


def _dressed(model: nn.Module, inputs: tuple[torch.Tensor, ...], method: str | None) -> tuple[Any, ...]:
    """The inputs, with those that a bare decoder takes as random variables at the prior, N(0, 1)."""
    conversion = conversion_of(model)
    names = inspect.signature(conversion.method(conversion.chosen(method), model)).parameters
    named = itertools.zip_longest(names, inputs)  # no names: of *inputs, or of too many, which the model itself refuses
    of_prior = [name in conversion.options.random_inputs for name, _ in named]
    prior = (RandomVariable(torch.zeros_like(x), torch.ones_like(x)) if r else x for r, x in zip(of_prior, inputs, strict=False))
    return tuple(prior)


def _of_the_file(args: argparse.Namespace) -> dict[str, Any] | None:
    """The constructor's arguments of a converted model; its file says itself what a checkpoint of another kind would."""
    return None if args.kwargs == FROM_CHECKPOINT else args.kwargs


def _spelled(shape: Sequence[int], dtype: torch.dtype) -> str:
    """A shape as ``--example-shape`` takes it."""
    name = "" if dtype == torch.float32 else f":{str(dtype).removeprefix('torch.')}"
    return ",".join(map(str, shape)) + name


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The conversion options that were given; the others keep their defaults."""
    names = [field.name for field in dataclasses.fields(Options) if hasattr(args, field.name)]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _guarded(args: argparse.Namespace, call: Callable[[], Any]) -> Any:
    """Run what runs the model's own code; its failure on our example is a refusal, not a crash."""
    try:
        return call()
    except (ConversionError, KeyboardInterrupt):
        raise
    except Exception as error:
        if args.traceback:
            raise
        shapes = ", ".join(str(tuple(s)) for s, _ in args.example_shape or ()) or "this input"
        text = (str(error).strip().splitlines() or [""])[0]
        raise ConversionError(
            f"the model failed on {shapes}: {type(error).__name__}: {text}. {_other_shapes(args, error)}; --traceback shows where"
        ) from error


def _other_shapes(args: argparse.Namespace, error: Exception) -> str:
    """What to type next: tokens where an embedding was given numbers, else any other inputs."""
    asked = args.example_shape or ()
    wants_integers = re.search(r"\b(expected|must be|indices)\b.*\b(long|int)\b", str(error), flags=re.S | re.I)
    if wants_integers and any(dtype.is_floating_point for _, dtype in asked):
        shapes = " ".join(f"--example-shape {_spelled(shape, torch.int64)}" for shape, _ in asked)
        return f"It takes integers, such as tokens: {shapes}"
    return "Give the inputs it takes, one --example-shape each, batch first"


# --- arguments ----------------------------------------------------------------------------------------


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity: null in their place."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"""{text!r} is not JSON ({error.msg} at character {error.pos + 1}); write '{{"latent_dim": 128}}'"""
        ) from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"""{text!r} is not a JSON object; write '{{"latent_dim": 128}}'""")
    return value


def _constructor_arguments(text: str) -> dict[str, Any] | str:
    return text if text == FROM_CHECKPOINT else _json_object(text)


def _shape(text: str) -> tuple[tuple[int, ...], torch.dtype]:
    sizes, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    try:
        shape = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1 or not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write 4,3,64,64, or 4:int64 for integers")
    return shape, dtype


def _at_least_one(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the same as JSON data")
    common.add_argument("--traceback", action="store_true", help="show where in the code a refusal came from")

    parser = argparse.ArgumentParser(
        prog="rvconvert",
        description="Turn any PyTorch VAE into an RV-VAE, whose decoder propagates means and variances, and back.",
        epilog="Exit codes: 0 done, 1 refused (one message on stderr), 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"rvconvert {library_version()}, torch {torch.__version__}")
    with contextlib.suppress(ImportError):  # rvconvert[completion]
        importlib.import_module("shtab").add_argument_to(parser, help="print a script that completes commands in this shell")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], Result], text: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"Example: {example}",
            parents=[common],
        )
        made.set_defaults(command=command, parser=made)
        return made

    demo = add(
        "demo",
        run_demo,
        "train, convert, transfer and compare on handwritten digits",
        "rvconvert demo --quick",
    )
    demo.add_argument("--out", default="rvconvert-demo", metavar="FOLDER", help="where to write (default: %(default)s)")
    demo.add_argument("--force", action="store_true", help="replace files of an earlier demo")
    demo.add_argument("--epochs", type=_at_least_one, metavar="N", help="training epochs of each model")
    demo.add_argument("--quick", action="store_true", help="a few epochs, to see that it works")
    demo.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    demo.add_argument("--truth", action="store_true", help="warn where training has not seen most of the variance")

    planner = add(
        "plan",
        run_plan,
        "show what conversion would do, operation by operation; exit 1 if one has no rule",
        "rvconvert plan models/vae.py:VAE --example-shape 4,3,64,64",
    )
    planner.add_argument("model", metavar="MODEL", help=MODEL)
    planner.add_argument("--checkpoint", metavar="FILE", help=f"plain weights to load first, {CHECKPOINT}")
    _add_model_options(planner)
    _add_source_options(planner)
    _add_conversion_options(planner)

    converter = add(
        "convert",
        run_convert,
        "convert a model with its plain weights into an RV-VAE's checkpoint",
        """rvconvert convert models/vae.py:VAE vae.pt rv_vae.pt --kwargs '{"latent_dim": 128}' --example-shape 4,3,64,64""",
    )
    converter.add_argument("model", metavar="MODEL", help=MODEL)
    converter.add_argument("source", metavar="CHECKPOINT", help=f"plain weights, {CHECKPOINT}")
    converter.add_argument("out", metavar="OUT", help=".pt, .pth or .safetensors to write")
    converter.add_argument("--force", action="store_true", help="replace OUT if it exists")
    _add_model_options(converter)
    _add_source_options(converter)
    _add_conversion_options(converter)

    transfer = add(
        "transfer",
        run_transfer,
        "write a converted model's weights for the plain class, to load with strict=True",
        "rvconvert transfer rv_vae.pt vae.pt",
    )
    transfer.add_argument("source", metavar="RV_CHECKPOINT", help="what convert or rvconvert.save wrote")
    transfer.add_argument("out", metavar="OUT", help=".pt, .pth or .safetensors to write")
    transfer.add_argument("--force", action="store_true", help="replace OUT if it exists")
    transfer.add_argument("--model", metavar="MODEL", help=f"check that the weights fit it: {MODEL}")
    transfer.add_argument(
        "--kwargs",
        type=_json_object,
        metavar="JSON",
        help="its constructor's arguments (default: the file's)",
    )
    transfer.add_argument("--allow-pickle", action="store_true", help="unpickle code in the file: only if you trust its author")

    exporter = add(
        "export",
        run_export,
        "write the plain model for other runtimes, deterministic: ONNX or torch.export",
        "rvconvert export models/vae.py:VAE vae.onnx --checkpoint vae.pt --example-shape 4,3,64,64",
    )
    exporter.add_argument("model", metavar="MODEL", help=MODEL)
    exporter.add_argument("out", metavar="OUT", help=".onnx or .pt2 to write")
    exporter.add_argument("--force", action="store_true", help="replace OUT if it exists")
    exporter.add_argument("--checkpoint", metavar="FILE", help=f"weights to load first, plain or converted, {CHECKPOINT}")
    exporter.add_argument("--method", default="forward", metavar="NAME", help="the method to export (default: %(default)s)")
    exporter.add_argument("--deviation", action="store_true", help="the deviation of every pixel as an output of its own")
    _add_model_options(exporter)
    _add_source_options(exporter)
    _add_conversion_options(exporter, only=_OF_DEVIATIONS)

    verifier = add(
        "verify",
        run_verify,
        "hold a converted model's moments against Monte Carlo, operation by operation",
        "rvconvert verify rv_vae.pt --model models/vae.py:VAE --images photos/ --size 64",
    )
    verifier.add_argument("source", metavar="RV_CHECKPOINT", help="what convert or rvconvert.save wrote")
    verifier.add_argument("--model", metavar="MODEL", help=f"its class: {MODEL}")
    verifier.add_argument(
        "--trust-recipe",
        action="store_true",
        help="import the class that the file names, which runs its code",
    )
    _add_model_options(verifier)
    verifier.add_argument("--images", metavar="PATH", help="images to run on: .npy, .npz, .pt, or a folder of pictures")
    verifier.add_argument("--count", type=_at_least_one, default=16, help="use at most so many images (default: %(default)s)")
    verifier.add_argument("--size", type=_at_least_one, help="crop and scale pictures of a folder to this side")
    verifier.add_argument(
        "--range", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"), help="of the pixels (default: 0 1)"
    )
    verifier.add_argument("--samples", type=_at_least_one, default=1000, help="Monte Carlo samples (default: %(default)s)")
    verifier.add_argument("--method", metavar="NAME", help="the converted method to check (default: the first)")
    verifier.add_argument("--plot", metavar="FILE", help="draw the ratio of variances over depth (needs matplotlib)")
    verifier.add_argument("--force", action="store_true", help="replace the plot if it exists")
    verifier.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    verifier.add_argument("--allow-pickle", action="store_true", help="unpickle code in the file: only if you trust its author")

    calibrator = add(
        "calibrate",
        _run_calibrate,
        "measure the gains of a model in calibrated mode and write them into its file",
        "rvconvert calibrate rv_vae.pt --model models/vae.py:VAE --images photos/ --size 64",
    )
    add_arguments(calibrator, _at_least_one)
    _add_constructor_options(calibrator)

    rules = add("rules", run_rules, "list the operations that have rules", "rvconvert rules conv")
    rules.add_argument("filter", nargs="?", metavar="NAME", help="only those whose name contains it")
    return parser


def _add_constructor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kwargs",
        type=_constructor_arguments,
        metavar="JSON",
        help=f"""the constructor's arguments: '{{"latent_dim": 128}}'; {FROM_CHECKPOINT}: those that Lightning saved""",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    _add_constructor_options(parser)
    parser.add_argument(
        "--example-shape",
        type=_shape,
        action="append",
        metavar="N,C,H,W",
        help="random input of this shape to run on; once for each input; 4:int64 for integers",
    )


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--key", help="the state_dict to take where a file holds several: ema.shadow")
    parser.add_argument("--prefix", help="take the weights whose keys begin with this")
    parser.add_argument("--allow-pickle", action="store_true", help="unpickle code in the file: only if you trust its author")


_OF_DEVIATIONS = ("random_inputs", "latent", "covariance", "rank", "seed")  # the options that decide what a deviation is


def _add_conversion_options(parser: argparse.ArgumentParser, only: Sequence[str] | None = None) -> None:
    group = parser.add_argument_group("conversion options, as of rvconvert.convert")
    for field in dataclasses.fields(Options):
        if not field.metadata["in_files"] or (only is not None and field.name not in only):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        default, check, help = field.default, field.metadata["check"], field.metadata["help"]
        if default is True:
            group.add_argument(f"--no-{flag[2:]}", dest=field.name, action="store_const", const=False, help=f"do not {help}")
        elif default is False:
            group.add_argument(flag, action="store_const", const=True, help=help)
        elif isinstance(default, tuple):
            shown = f" (default: {', '.join(default)})" if default else ""
            group.add_argument(flag, type=_names, metavar="NAME[,NAME]", help=help + shown)
        elif hasattr(check, "choices"):
            group.add_argument(flag, choices=check.choices, help=f"{help} (default: {default})")
        elif field.name == "variance_dtype":
            group.add_argument(flag, type=_dtype, metavar="DTYPE", help=help)
        elif isinstance(default, float):
            group.add_argument(flag, type=float, metavar="X", help=f"{help} (default: {default:g})")
        else:
            group.add_argument(flag, type=int, metavar="N", help=help)


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is no dtype; write float32, bfloat16 or float16")
    return dtype


if __name__ == "__main__":
    sys.exit(main())
