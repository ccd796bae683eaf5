"""``rvconvert calibrate``: measure the gains of a saved model on images, and write the file back with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rvconvert.calibration import calibrate
from rvconvert.cli.images import read_images
from rvconvert.errors import ConversionError
from rvconvert.files import checkpoint

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

__all__ = ["add_arguments", "run_calibrate"]


def add_arguments(parser: argparse.ArgumentParser, at_least_one: Callable[[str], int]) -> None:
    """The arguments of the command, but for those that construct a model."""
    parser.add_argument("source", metavar="RV_CHECKPOINT", help="what convert or rvconvert.save wrote; it is rewritten")
    parser.add_argument("--model", metavar="MODEL", help="its class: package.module:Class or path/file.py:Class")
    parser.add_argument("--trust-recipe", action="store_true", help="import the class that the file names, which runs its code")
    parser.add_argument("--images", metavar="PATH", required=True, help=".npy, .npz, .pt, or a folder of pictures")
    parser.add_argument("--count", type=at_least_one, default=256, help="use at most so many images (default: %(default)s)")
    parser.add_argument("--pairs", type=at_least_one, default=32, help="pairs of paths for each image (default: %(default)s)")
    parser.add_argument("--size", type=at_least_one, help="crop and scale pictures of a folder to this side")
    parser.add_argument(
        "--range", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"), help="of the pixels (default: 0 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the paths (default: %(default)s)")
    parser.add_argument("--allow-pickle", action="store_true", help="unpickle code in the file: only if you trust its author")


def run_calibrate(args: argparse.Namespace) -> tuple[dict[str, Any], Sequence[Any], int]:
    """Run the command; the file is replaced in one step at the end, or not at all."""
    source = checkpoint.read(args.source, allow_pickle=args.allow_pickle)
    model = checkpoint.build(source, model=args.model, kwargs=args.kwargs, trust_recipe=args.trust_recipe)
    covariance = model.__dict__["_rvconvert"].settings.covariance
    if covariance != "calibrated":
        raise ConversionError(
            f"{args.source} holds a model in covariance={covariance!r}, which has no gains; convert the plain checkpoint with "
            "--covariance calibrated"
        )
    low, high = args.range
    images = read_images(args.images, count=args.count, size=args.size) * (high - low) + low
    try:
        report = calibrate(model, images, pairs=args.pairs, images=args.count, seed=args.seed)
    except ConversionError:
        raise
    except Exception as error:  # the model's own code
        if args.traceback:
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        what = f"{tuple(images.shape)}: {type(error).__name__}: {text}"
        raise ConversionError(
            f"the model failed on images {what}. --size N crops and scales them to the size it takes; --traceback shows where"
        ) from error
    gains = model.__dict__["_rvconvert"].gains.to_tensors()
    checkpoint.write(source.state, args.source, recipe=source.recipe, gains=gains, force=True)
    data = {**report.to_dict(), "checkpoint": str(args.source)}
    return data, [str(report), f"{args.source}: rewritten with {len(report)} gains"], 0
