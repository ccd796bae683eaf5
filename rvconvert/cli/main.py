"""The command line: demo, plan, convert, transfer, verify, calibrate, rules. Exit 0 done, 1 refused, 2 usage."""

from __future__ import annotations

import argparse
import inspect
import json
import os
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
from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.registry import REGISTRY
from rvconvert.errors import ConversionError, TransferError
from rvconvert.files import checkpoint
from rvconvert.files.recipe import Recipe, construct, import_class, library_version
from rvconvert.plain import transfer_weights
from rvconvert.verify import verify

__all__ = ["main"]

MODEL = "package.module:Class or path/file.py:Class"
CHECKPOINT = ".pt, .pth, .ckpt or .safetensors"
Result = tuple[dict[str, Any], Sequence[Any], int]  # data for --json, renderables for people, exit code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        data, shown, code = args.command(args)
        if args.json:
            print(json.dumps(data, indent=2))
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
    model = _model(args)
    if args.checkpoint:
        _fill(model, args.checkpoint, args)
    report = _guarded(args, lambda: plan(model, example_inputs=_examples(args), **_options(args)))
    return report.to_dict(), [render.report_table(report)], 1 if report.unsupported else 0


def run_convert(args: argparse.Namespace) -> Result:
    checkpoint.check_destination(args.out, force=args.force)
    source = checkpoint.read(args.source, allow_pickle=args.allow_pickle)
    if source.recipe is not None:
        raise ConversionError(
            f"{args.source} holds a converted model already; take its plain weights first: rvconvert transfer {args.source} OUT"
        )
    model = _model(args, source)
    notes = _fill(model, source, args)
    examples = _examples(args)
    made = _guarded(args, lambda: convert(model, example_inputs=examples, inplace=True, **_options(args)))
    if examples is None:
        notes.append("not tried on an input: give --example-shape to have every operation checked now")
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
    next_step = f"next: rvconvert verify {args.out} --model {args.model}"
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


def run_verify(args: argparse.Namespace) -> Result:
    if args.plot:
        checkpoint.check_destination(args.plot, force=args.force, suffixes=(".png", ".svg", ".pdf"))
    model = checkpoint.load(
        args.source,
        model=args.model,
        kwargs=args.kwargs,
        trust_recipe=args.trust_recipe,
        allow_pickle=args.allow_pickle,
    ).eval()
    if args.images:
        low, high = args.range
        inputs: Any = (read_images(args.images, count=args.count, size=args.size) * (high - low) + low,)
    else:
        inputs = _examples(args)
    if inputs is None:
        raise ConversionError("nothing to run the model on: give --images PATH or --example-shape N,C,H,W")
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
    """The model that the arguments name; Lightning's hyper-parameters stand in for --kwargs."""
    cls = import_class(args.model)
    if args.kwargs is None and source is not None and source.hyper_parameters:
        taken = inspect.signature(cls).parameters
        args.kwargs = {k: v for k, v in source.hyper_parameters.items() if k in taken}
    return construct(cls, args.kwargs)


def _fill(model: nn.Module, source: checkpoint.Checkpoint | str, args: argparse.Namespace) -> list[str]:
    """Load a plain checkpoint into the model; returns what a person should know about it."""
    if isinstance(source, str):
        source = checkpoint.read(source, allow_pickle=args.allow_pickle)
    state, prefix = checkpoint.fit_keys(source, model, args.prefix)
    try:
        transfer_weights(state, model)
    except TransferError as error:
        raise TransferError(f"{source.path}: {error}") from None
    notes = []
    if prefix:
        left = len(source.state) - len(state)
        notes.append(f"took the prefix {prefix!r} off the keys" + (f", left out {left} entries without it" if left else ""))
    if source.hyper_parameters and args.kwargs:
        notes.append(f"constructed with {args.kwargs}")
    return notes


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


def _dressed(model: nn.Module, inputs: tuple[torch.Tensor, ...], method: str | None) -> tuple[Any, ...]:
    """The inputs, with those that a bare decoder takes as random variables at the prior, N(0, 1)."""
    conversion = model.__dict__["_rvconvert"]
    options = conversion.options
    method = method or options.methods[0]
    if method not in options.methods:
        raise ConversionError(f"{method!r} is not converted; {', '.join(options.methods)} is")
    names = list(inspect.signature(conversion.method(method)).parameters)[1:]
    prior = {name: RandomVariable(torch.zeros_like(x), torch.ones_like(x)) for name, x in zip(names, inputs, strict=False)}
    return tuple(prior[name] if name in options.random_inputs else x for name, x in zip(names, inputs, strict=False))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The conversion options that were given; the others keep the defaults of ``convert``."""
    names = (*_VALUE_OPTIONS, "seed", "fuse", "attach", "strict")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "variance_dtype" in given:
        given["variance_dtype"] = getattr(torch, given["variance_dtype"])
    return given


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
            f"the model failed on {shapes}: {type(error).__name__}: {text}. Give the inputs it takes, one "
            "--example-shape each, batch first; --traceback shows where"
        ) from error


# --- arguments ----------------------------------------------------------------------------------------


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


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


_VALUE_OPTIONS: dict[str, dict[str, Any]] = {
    "methods": {"type": _names, "metavar": "NAME[,NAME]", "help": "methods to convert (default: forward)"},
    "random_inputs": {
        "type": _names,
        "metavar": "NAME[,NAME]",
        "help": "arguments given as random variables: a bare decoder's latent",
    },
    "output": {"choices": ("mean", "distribution"), "help": "what the model returns (default: mean)"},
    "penalty": {
        "type": float,
        "metavar": "WEIGHT",
        "help": "weight of L_c, the paper's lambda (default: 50)",
    },
    "penalty_kind": {
        "choices": ("squared", "expected"),
        "help": "L_c of squared variances (default), or of variances",
    },
    "covariance": {
        "choices": ("independent", "calibrated", "lowrank", "sampled"),
        "help": "how variance is carried (default: independent)",
    },
    "rank": {"type": _at_least_one, "metavar": "R", "help": "pairs of nodes in low-rank mode"},
    "pairs": {"type": _at_least_one, "metavar": "P", "help": "antithetic pairs in sampled mode"},
    "engine": {"choices": ("auto", "graph", "dispatch"), "help": "how the model is captured (default: auto)"},
    "variance_dtype": {
        "choices": ("float32", "bfloat16", "float16"),
        "help": "dtype of the variance's matrix work",
    },
}


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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], Result], text: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"Example: {example}",
            parents=[common],
        )
        made.set_defaults(command=command)
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
        run_calibrate,
        "measure the gains of a model in calibrated mode and write them into its file",
        "rvconvert calibrate rv_vae.pt --model models/vae.py:VAE --images photos/ --size 64",
    )
    add_arguments(calibrator, _at_least_one)
    _add_model_options(calibrator)

    rules = add("rules", run_rules, "list the operations that have rules", "rvconvert rules conv")
    rules.add_argument("filter", nargs="?", metavar="NAME", help="only those whose name contains it")
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kwargs",
        type=_json_object,
        metavar="JSON",
        help="""the constructor's arguments: '{"latent_dim": 128}'""",
    )
    parser.add_argument(
        "--example-shape",
        type=_shape,
        action="append",
        metavar="N,C,H,W",
        help="random input of this shape to run on; once for each input; 4:int64 for integers",
    )


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefix", help="take the weights whose keys begin with this")
    parser.add_argument("--allow-pickle", action="store_true", help="unpickle code in the file: only if you trust its author")


def _add_conversion_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conversion options, as of rvconvert.convert")
    for name, options in _VALUE_OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", **options)
    group.add_argument("--seed", type=int, help="fixes the draws of the sampled and low-rank modes")
    group.add_argument("--fuse", action="store_const", const=True, help="adjacent linear maps propagate variance as one")
    group.add_argument("--no-attach", dest="attach", action="store_const", const=False, help="leave L_c out of the gradient")
    group.add_argument("--strict", action="store_const", const=True, help="refuse operations without a rule of their own")


if __name__ == "__main__":
    sys.exit(main())
