"""What the examples share and what is not about their models: arguments, batches, evaluation, files.

A run writes into `--out DIR`: `config.json`, `metrics.jsonl` (one line an epoch), labelled picture grids
and `checkpoint.pt`, from which `--resume` continues as if the run had never stopped.
Every mean squared error here is per pixel value of images in [0, 1], whatever range the model works in.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

import image_sets

SHOWN = ("loss", "reconstruction", "kl", "validation_loss", "test_mse_mean", "test_mse_sample", "test_mse_rv")
MAY_CHANGE_ON_RESUME = {"epochs", "resume", "out", "data", "device", "pictures"}


def argument_parser(description: str, epochs: int = 150, batch: int | None = 64) -> argparse.ArgumentParser:
    """The arguments that all examples understand; an example adds its own to the parser."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    optional = {"default": argparse.SUPPRESS}  # a default of None would say nothing in --help
    parser.add_argument("--data", type=Path, metavar="DIR", help="torchvision folder or npz files", **optional)
    parser.add_argument("--dataset", choices=image_sets.SIZES, help="mnist with --data, else digits", **optional)
    parser.add_argument("--size", type=int, help="of the images, if not the set's own", **optional)
    parser.add_argument("--train-images", type=int, metavar="N", help="only the first N", **optional)
    parser.add_argument("--test-images", type=int, metavar="N", help="only the first N", **optional)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="runs/SYSTEM-DATASET[-rv]", **optional)
    parser.add_argument("--pictures", type=int, default=5, metavar="N", help="write pictures every N epochs")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt, if there is one")
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="channels / N, for slow machines")
    parser.add_argument("--smoke", action="store_true", help="seconds on one core: tiny model, few images")
    parser.add_argument("--rv", action="store_true", help="train the random-variable form of the model")
    parser.add_argument("--covariance", choices=("independent", "calibrated", "lowrank", "sampled"), default="independent")
    parser.add_argument("--pairs", type=int, default=1, help="antithetic pairs, with --covariance sampled")
    parser.add_argument("--rank", type=int, help="rows of factors, with --covariance lowrank", **optional)
    parser.add_argument("--penalty", type=float, default=50.0, help="the weight of L_c, the variance penalty")
    return parser


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's arguments, or these; they seed the random state."""
    args = parser.parse_args(arguments)
    args.data = getattr(args, "data", None)
    args.dataset = getattr(args, "dataset", "digits" if args.data is None or args.smoke else "mnist")
    name = f"{Path(parser.prog).stem}-{args.dataset}{'-rv' if args.rv else ''}"
    args.out = getattr(args, "out", Path("runs") / name)
    args.size = getattr(args, "size", image_sets.SIZES[args.dataset])
    args.train_images = getattr(args, "train_images", 192 if args.smoke else None)
    args.test_images = getattr(args, "test_images", 32 if args.smoke else None)
    if args.smoke:
        args.epochs, args.batch, args.device = 2, 32, "cpu"
    torch.manual_seed(args.seed)
    return args


def conversion_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `--rv` hands to `rvconvert.convert`."""
    rank = getattr(args, "rank", None)
    return {"covariance": args.covariance, "pairs": args.pairs, "rank": rank, "penalty": args.penalty}


class Data(NamedTuple):
    """uint8 images of shape (N, channels, size, size), on the device that trains."""

    train: Tensor
    validation: Tensor  # the last tenth of the training images: the test images choose nothing
    test: Tensor


def load_data(args: argparse.Namespace) -> Data:
    try:
        train, test = image_sets.load(args.dataset, args.data, args.size)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    train, test = train[: args.train_images].to(args.device), test[: args.test_images].to(args.device)
    cut = len(train) - len(train) // 10
    return Data(train[:cut], train[cut:], test)


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats, one value a row: (N, D) and (N, D) to (N,)."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)


def sample_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """The reparameterization trick: a draw from N(mu, exp(logvar)) that carries gradients."""
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


class Views(NamedTuple):
    """What a run measures and draws of its models, all in the range of the pixels that they see.

    `encode` gives mu and logvar of images and `decode` is the plain decoder; `validation_loss` is the batch's;
    `samples` names the ways from a standard normal latent to an image. With --rv, `propagate` reconstructs images
    by random variables and `penalty` is the value of L_c at the last call.
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor], Tensor]
    validation_loss: Callable[[Tensor], Tensor]
    samples: dict[str, Callable[[Tensor], Tensor]]
    propagate: Callable[[Tensor], Tensor] | None = None
    penalty: Callable[[], Tensor] | None = None


class Run:
    """One training run: hands out epochs and batches, and at each epoch's end measures, draws and saves.

    `states` is everything that training changes and a checkpoint must hold (models, optimizers, schedulers,
    or a module of buffers); models among them are switched between train and eval mode here, and are in eval mode
    when `epochs` has handed out the last one.
    `value_range` is the range of the pixels that the model sees. Set `views` before the first epoch ends.
    """

    def __init__(self, args: argparse.Namespace, data: Data, value_range: tuple[float, float] = (-1.0, 1.0), **states) -> None:
        self.args, self.data, self.states = args, data, states
        self.views: Views | None = None
        self.low, self.high = value_range
        self.modules = [state for state in states.values() if isinstance(state, nn.Module)]
        self.epoch = 0
        self.config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        self.config["training_images"] = len(data.train)
        self.checkpoint, self.metrics = args.out / "checkpoint.pt", args.out / "metrics.jsonl"
        self.progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        if args.resume and self.checkpoint.exists():
            self._resume()
        elif self.metrics.exists():
            raise SystemExit(f"{args.out} holds a run already: go on with --resume, or choose another --out")
        args.out.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self.config, indent=1) + "\n"
        _write_atomically(args.out / "config.json", lambda file: file.write_text(config))

    def epochs(self) -> Iterator[int]:
        with self.progress:
            task = self.progress.add_task("epochs", total=self.args.epochs, completed=self.epoch)
            while self.epoch < self.args.epochs:
                self.epoch += 1
                self.sums: dict[str, list] = {}
                self.start = time.perf_counter()
                for module in self.modules:
                    module.train()
                yield self.epoch
                self.progress.advance(task)
        for module in self.modules:
            module.eval()

    def batches(self, flip: bool = False) -> Iterator[Tensor]:
        """Training images in the model's range, shuffled, the incomplete last batch dropped."""
        size = min(self.args.batch, len(self.data.train))
        order = torch.randperm(len(self.data.train)).to(self.data.train.device)
        order = order[: len(order) // size * size].view(-1, size)
        task = self.progress.add_task(f"epoch {self.epoch}", total=len(order))
        for rows in order:
            x = self.to_range(self.data.train[rows])
            if flip:
                mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
                x = torch.where(mirrored, x.flip(-1), x)
            yield x
            self.progress.advance(task)
        self.progress.remove_task(task)

    def log(self, **values: Tensor | float) -> None:
        """Add to this epoch's means; nothing is read back from the device before the epoch ends."""
        for name, value in values.items():
            total = self.sums.setdefault(name, [0.0, 0])
            total[0] += value.detach() if isinstance(value, Tensor) else value
            total[1] += 1

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Measure on validation and test images, write the metrics line, the pictures and the checkpoint."""
        line = {"epoch": self.epoch, "seconds": round(time.perf_counter() - self.start, 2)}
        line |= {name: float(total) / count for name, (total, count) in self.sums.items()}
        for module in self.modules:
            module.eval()
        with torch.random.fork_rng():  # training's random state is not touched by measuring
            torch.manual_seed(self.args.seed)
            line |= self._mean(self.data.validation, self._validate)
            line |= self._mean(self.data.test, self._measure)
            if self.epoch % self.args.pictures == 0 or self.epoch == self.args.epochs:
                self._draw()
        with open(self.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{name} {line[name]:.4g}" for name in SHOWN if name in line)
        self.progress.console.print(f"epoch {self.epoch:3d}  {shown}", highlight=False, soft_wrap=True)
        broken = [name for name, value in line.items() if not math.isfinite(value)]
        if broken:
            raise SystemExit(f"epoch {self.epoch}: not finite: {', '.join(broken)}")
        self._save()

    def to_range(self, images: Tensor) -> Tensor:
        return images.float() * ((self.high - self.low) / 255) + self.low

    def mse(self, a: Tensor, b: Tensor) -> Tensor:
        return F.mse_loss(a, b) / (self.high - self.low) ** 2

    def _validate(self, x: Tensor) -> dict[str, Tensor]:
        losses = {"validation_loss": self.views.validation_loss(x)}
        if self.views.penalty:
            losses["validation_penalty"] = self.views.penalty()
        return losses

    def _measure(self, x: Tensor) -> dict[str, Tensor]:
        mu, logvar = self.views.encode(x)
        from_mean = self.views.decode(mu)
        measured = {
            "test_kl": kl_divergence(mu, logvar).mean(),
            "test_mse_mean": self.mse(from_mean, x),
            "test_mse_sample": self.mse(self.views.decode(sample_normal(mu, logvar)), x),
        }
        if self.views.propagate:
            propagated = self.views.propagate(x)
            measured["test_mse_rv"] = self.mse(propagated, x)
            measured["test_mse_between_rv_and_mean"] = self.mse(propagated, from_mean)
        return measured

    def _mean(self, images: Tensor, function: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for rows in images.tensor_split(math.ceil(len(images) / self.args.batch)):  # no tiny last batch
            for name, value in function(self.to_range(rows)).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(rows) / len(images)
        return totals

    def _draw(self) -> None:
        x = self.to_range(self.data.test[:10])
        mu, logvar = self.views.encode(x)
        decode = self.views.decode
        rows = {"input": x, "from the mean": decode(mu), "from a sample": decode(sample_normal(mu, logvar))}
        if self.views.propagate:
            rows["random variable"] = self.views.propagate(x)
        self._save_grid(f"reconstructions_{self.epoch:04d}.png", rows)
        z = torch.randn(10, mu.shape[1]).to(x.device)
        self._save_grid(f"samples_{self.epoch:04d}.png", {name: draw(z) for name, draw in self.views.samples.items()})

    def _save_grid(self, name: str, rows: dict[str, Tensor]) -> None:
        rows = {label: (row - self.low) / (self.high - self.low) for label, row in rows.items()}
        _write_atomically(self.args.out / name, lambda file: labelled_grid(rows).save(file, format="PNG"))

    def _save(self) -> None:
        saved = {
            "epoch": self.epoch,
            "config": self.config,
            "states": {name: state.state_dict() for name, state in self.states.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        _write_atomically(self.checkpoint, lambda file: torch.save(saved, file))

    def _resume(self) -> None:
        saved = torch.load(self.checkpoint, map_location=self.args.device, weights_only=True)
        differ = [
            f"{name} was {saved['config'].get(name)!r}, is {value!r}"
            for name, value in self.config.items()
            if name not in MAY_CHANGE_ON_RESUME and saved["config"].get(name) != value
        ]
        if differ:
            raise SystemExit(f"{self.checkpoint} is of another run: {'; '.join(differ)}")
        for name, state in self.states.items():
            state.load_state_dict(saved["states"][name])
        torch.set_rng_state(saved["rng"].cpu())
        if saved["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([state.cpu() for state in saved["cuda_rng"]])
        self.epoch = saved["epoch"]
        # A run cut off between its metrics line and its checkpoint will do that epoch again.
        lines = self.metrics.read_text().splitlines(keepends=True)
        kept = "".join(line for line in lines if json.loads(line)["epoch"] <= self.epoch)
        _write_atomically(self.metrics, lambda file: file.write_text(kept))


def labelled_grid(rows: dict[str, Tensor], margin: int = 2) -> Image.Image:
    """One picture with a labelled row for each entry: float images (N, 1 or 3, size, size) in [0, 1]."""
    zoom = max(1, 64 // next(iter(rows.values())).shape[-1])
    tile = next(iter(rows.values())).shape[-1] * zoom + margin
    font = ImageFont.load_default(size=13)
    label_width = max(int(font.getlength(label)) for label in rows) + 4 * margin
    columns = max(len(images) for images in rows.values())
    picture = Image.new("RGB", (label_width + columns * tile, len(rows) * tile + margin), "white")
    pen = ImageDraw.Draw(picture)
    for i, (label, images) in enumerate(rows.items()):
        pen.text((2 * margin, i * tile + tile / 2), label, fill="black", font=font, anchor="lm")
        pixels = (images.detach().clamp(0, 1) * 255).round().byte().cpu().expand(-1, 3, -1, -1)
        for j, image in enumerate(pixels.permute(0, 2, 3, 1)):
            side = image.shape[0] * zoom
            tile_image = Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(tile_image, (label_width + j * tile, i * tile + margin))
    return picture


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename: a reader, or a run that was cut off, never sees half a file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
