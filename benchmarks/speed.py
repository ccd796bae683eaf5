"""Time, memory and arithmetic of a converted model's training step and forward pass, against the plain model's.

    python -m benchmarks.speed                  # on the processor
    python -m benchmarks.speed --device cuda    # on a GPU: TF32 and bf16 autocast, eager and compiled, the whole table
    python -m benchmarks.speed --no-kernels     # compiling nothing
    python -m benchmarks.speed --table          # the README's, of the figures that these wrote
    python -m benchmarks.speed --models VanillaVAE --rounds 3 --gate 4    # exit code 1 above this ratio; writes nothing

Each variant runs in turn with the plain model, in one process; a figure is the ratio of the medians of their times. FLOPs and
bytes are those of one training step: bytes, what each operation reads and writes once, an elementwise kernel being one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import dc_vae
import soft_intro_vae
from beta_tcvae import BetaTCVAE
from vae import VanillaVAE

import rvconvert
from benchmarks.memory import kept_for_backward
from benchmarks.naive import NaiveDecoder
from rvconvert.moments.compilation import fused

Run = Callable[[], Tensor]
RESULTS = Path(__file__).resolve().parent / "results" / "speed.json"


class Autoencoder(nn.Module):
    """An encoder and a decoder of an example that has no class for the whole."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x)
        return self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)), mu, logvar


def dc() -> nn.Module:
    return Autoencoder(dc_vae.Encoder(128), dc_vae.Decoder(128))


def soft_intro() -> nn.Module:
    channels = soft_intro_vae.SETTINGS["cifar10"].channels
    return Autoencoder(soft_intro_vae.Encoder(3, 128, channels, 32), soft_intro_vae.Decoder(3, 128, channels, 32))


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # constructor, image size, batch
    "VanillaVAE": (VanillaVAE, 64, 64),
    "beta-TCVAE": (BetaTCVAE, 64, 64),
    "DC-VAE": (dc, 32, 32),
    "Soft-Intro-VAE": (soft_intro, 32, 32),
}


def loss_of(out: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).mean()
    return (out.float() - x).square().mean() + 1e-3 * kl.float()


def steps_of(plain: nn.Module, x: Tensor, args: argparse.Namespace) -> dict[str, Run]:
    """Every variant's forward pass with its loss."""

    def converted(**options: object) -> nn.Module:
        return rvconvert.convert(plain, example_inputs=x, **options)

    models = {"plain": plain, "rvconvert": converted()}
    if args.variance_bf16:
        models["rvconvert, variance in bfloat16"] = converted(variance_dtype=torch.bfloat16)
    if args.compile:
        models |= {f"{name}, compiled": torch.compile(copy.deepcopy(m), mode=args.mode) for name, m in models.items()}
    steps: dict[str, Run] = {}
    for name, m in models.items():

        def step(m: nn.Module = m) -> Tensor:
            out, mu, logvar = m(x)
            return loss_of(out, x, mu, logvar)

        steps[name] = step

    def sampled(count: int) -> Tensor:
        mu, logvar = plain.encode(x)
        std = torch.exp(0.5 * logvar)
        z = (mu + torch.randn(count, *mu.shape, device=mu.device) * std).flatten(0, 1)
        out = plain.decode(z).unflatten(0, (count, -1)).mean(0)
        return loss_of(out, x, mu, logvar)

    for count in args.samples:
        steps[f"Monte Carlo, {count} sample{'s' * (count > 1)}"] = lambda count=count: sampled(count)
    layers = sequential_decoder(plain)
    if layers is not None:
        naive = NaiveDecoder(layers)

        def naive_step() -> Tensor:
            mu, logvar = plain.encode(x)
            out, var = naive(mu, logvar.exp())
            return loss_of(out, x, mu, logvar) + 50.0 * var.square().mean()

        steps["the paper's method, naive"] = naive_step
        with contextlib.suppress(ImportError):
            steps["fastbnns"] = fastbnns_step(plain, layers, x)
    return steps


def sequential_decoder(model: nn.Module) -> list[nn.Module | tuple[int, ...]] | None:
    """A decoder as a list of layers and views, where it is one."""
    if isinstance(model, VanillaVAE):
        layers: list[nn.Module | tuple[int, ...]] = [model.decoder_input, tuple(model.bottom_shape)]
        return layers + [layer for block in (*model.decoder, model.final_layer) for layer in block]
    return None


def fastbnns_step(plain: nn.Module, layers: list[nn.Module | tuple[int, ...]], x: Tensor) -> Run:
    """The same decoder converted by fastbnns, its weights' own uncertainty included, as it cannot be left out."""
    from fastbnns.bnn.base import BNN
    from fastbnns.bnn.types import MuVar

    modules = [nn.Unflatten(1, layer) if isinstance(layer, tuple) else copy.deepcopy(layer) for layer in layers]
    decoder = BNN(nn=nn.Sequential(*modules), convert_in_place=False).to(x.device)

    def step() -> Tensor:
        mu, logvar = plain.encode(x)
        y = decoder(MuVar((mu, logvar.exp())))
        return loss_of(y[0], x, mu, logvar) + 50.0 * y[1].square().mean()

    return step


class Meter:
    """Measures runs on one device: interleaved, median."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.cuda = args.device == "cuda"
        self.clock = time.process_time if args.clock == "process" else time.perf_counter

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.dtype == "bf16")

    def once(self, run: Run, parameters: list[Tensor], train: bool) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        start = self.clock()
        if train:
            with self.autocast():
                loss = run()
            loss.backward()
        else:
            with self.autocast(), torch.no_grad():
                run()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = self.clock() - start
        for p in parameters:
            p.grad = None
        return seconds

    def times(
        self, runs: dict[str, Run], parameters: list[Tensor], train: bool
    ) -> tuple[dict[str, float], dict[str, str], float]:
        """Ratio of each run to the plain one, which is timed in turn with it; why a run could not be; plain seconds."""
        failed: dict[str, str] = {}
        ratios: dict[str, float] = {}
        plain_seconds: list[float] = []
        for name, run in runs.items():
            try:
                for _ in range(1 if name.startswith("Monte Carlo") else 2):  # compiles what is to be compiled
                    self.once(run, parameters, train)
            except Exception as error:
                if name in ("plain", "rvconvert"):
                    raise
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:90]
                continue
            pairs = [[self.once(each, parameters, train) for each in (runs["plain"], run)] for _ in range(self.args.rounds)]
            plain, own = zip(*pairs, strict=True)
            ratios[name] = statistics.median(own) / statistics.median(plain)
            plain_seconds += plain
        return ratios, failed, statistics.median(plain_seconds)

    def memory(self, run: Run, parameters: list[Tensor]) -> float:
        """Bytes: the peak on a GPU; on the processor, what a step keeps for its backward pass, each storage once."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.once(run, parameters, True)
            return float(torch.cuda.max_memory_allocated())
        return kept_for_backward(run)


def flops(run: Run) -> float:
    with FlopCounterMode(display=False) as counter:
        run().backward()
    return float(counter.get_total_flops())


class BytesMoved(TorchDispatchMode):
    """Bytes that operations read and write, views aside; a fused kernel reads its inputs and writes its results once."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        # Every module with kernels has the function under its own name.
        self.kernels = [m for name, m in sys.modules.items() if name.startswith("rvconvert.rules.") and hasattr(m, "fused")]

    def add(self, *values: object) -> None:
        self.total += sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__ and "detach" not in func.__name__:
            self.add(args, kwargs, result)
        return result

    def __enter__(self) -> BytesMoved:
        def counted(kernel: Callable[..., object], *tensors: Tensor, **options: object) -> object:
            with torch._C._DisableTorchDispatch():
                result = fused(kernel, *tensors, **options)
            self.add(tensors, result)
            return result

        for module in self.kernels:
            module.fused = counted  # type: ignore[assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for module in self.kernels:
            module.fused = fused


def bytes_moved(run: Run) -> float:
    with BytesMoved() as counter:
        run().backward()
    return float(counter.total)


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Ratios to the plain model of every variant of one model."""
    torch.manual_seed(0)
    build, size, batch = MODELS[name]
    plain = build().to(args.device)
    x = torch.rand(args.batch or batch, 3, size, size, device=args.device)
    meter = Meter(args)
    result: dict[str, object] = {"model": name, "batch": len(x), "rows": {}}
    rows: dict[str, dict[str, float | str]] = {}
    runs = steps_of(plain, x, args)
    parameters = list(plain.parameters())
    ratios, failed, result["plain_seconds"] = meter.times(runs, parameters, True)
    base_flops, base_bytes = flops(runs["plain"]), bytes_moved(runs["plain"])
    base_memory = meter.memory(runs["plain"], parameters)
    for variant, run in runs.items():
        if variant in failed:
            rows[variant] = {"failed": failed[variant]}
            continue
        row: dict[str, float | str] = {"step": ratios[variant]}
        if "compiled" not in variant:
            row["flops"] = flops(run) / base_flops
            row["bytes"] = bytes_moved(run) / base_bytes
            row["memory"] = meter.memory(run, parameters) / base_memory
        rows[variant] = row
    plain.eval()
    with torch.no_grad():
        evaluated = steps_of(plain, x, args)  # converted in eval mode
    evaluated = {k: v for k, v in evaluated.items() if k not in failed and "naive" not in k and k != "fastbnns"}
    back = rvconvert.to_plain(rvconvert.convert(plain, example_inputs=x))

    def back_step() -> Tensor:
        out, mu, logvar = back(x)
        return loss_of(out, x, mu, logvar)

    evaluated["to_plain"] = back_step
    for variant, ratio in meter.times(evaluated, parameters, False)[0].items():
        rows.setdefault(variant, {})["forward"] = ratio
    result["rows"] = rows
    return result


def table(results: list[dict[str, object]], args: argparse.Namespace) -> Table:
    title = f"Times over the plain model's ({args.device}, {args.dtype}, {args.clock} clock, median of {args.rounds})"
    made = Table(title=title)
    for heading in ("model", "variant", "training step", "FLOPs", "bytes", "memory", "forward in eval mode"):
        made.add_column(heading, justify="left" if heading in ("model", "variant") else "right")
    for result in results:
        label = f"{result['model']}, batch {result['batch']}, plain step {1e3 * result['plain_seconds']:.0f} ms"  # type: ignore[operator]
        for variant, row in result["rows"].items():  # type: ignore[attr-defined]
            if "failed" in row:
                made.add_row(label, variant, row["failed"], "", "", "", "")
            else:
                cells = (row.get(column) for column in ("step", "flops", "bytes", "memory", "forward"))
                made.add_row(label, variant, *("" if cell is None else f"{cell:.2f}" for cell in cells))
            label = ""
        made.add_section()
    return made


def add_to(path: Path, result: dict[str, object]) -> None:
    """Put one model's figures into a file of such, in the place of earlier ones."""
    same = ("model", "dtype", "device", "kernels")
    held = json.loads(path.read_text()) if path.exists() else []
    held = [r for r in held if any(r.get(key) != result.get(key) for key in same)]
    path.write_text(json.dumps([*held, result], indent=1))


def markdown(held: list[dict[str, object]]) -> str:
    """The README's table, of a file of figures: one row for each model, device and type of number."""
    columns = {
        "plain step": lambda r, rows: f"{1e3 * r['plain_seconds']:.0f} ms",
        "converted": lambda r, rows: cell(rows.get("rvconvert"), "step"),
        "compiling nothing": lambda r, rows: cell(without.get((r["model"], r["device"], r["dtype"])), "step"),
        "2 samples": lambda r, rows: cell(rows.get("Monte Carlo, 2 samples"), "step"),
        "naive": lambda r, rows: cell(rows.get("the paper's method, naive"), "step"),
        "fastbnns": lambda r, rows: cell(rows.get("fastbnns"), "step"),
        "FLOPs": lambda r, rows: cell(rows.get("rvconvert"), "flops"),
        "memory": lambda r, rows: cell(rows.get("rvconvert"), "memory"),
        "forward": lambda r, rows: cell(rows.get("rvconvert"), "forward"),
        "forward, 3 samples": lambda r, rows: cell(rows.get("Monte Carlo, 3 samples"), "forward"),
    }

    def cell(row: dict[str, float] | None, key: str) -> str:
        return f"{row[key]:.2f}" if row and key in row else ""

    without = {(r["model"], r["device"], r["dtype"]): r["rows"]["rvconvert"] for r in held if not r["kernels"]}  # type: ignore[index]
    lines = [f"| model, batch | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for r in held:
        if r["kernels"]:
            cells = (make(r, r["rows"]) for make in columns.values())
            lines.append(f"| {r['model']}, {r['batch']} ({r['device']}, {r['dtype']}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    dtypes = ("fp32", "tf32", "bf16")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, help="bf16: autocast; default fp32, on a GPU tf32 and bf16")
    parser.add_argument("--variance-bf16", action="store_true", help="also variance_dtype=torch.bfloat16; always on a GPU")
    parser.add_argument("--compile", action="store_true", help="also both models through torch.compile; always on a GPU")
    parser.add_argument("--mode", default=None, help="torch.compile's mode, for instance reduce-overhead")
    parser.add_argument("--no-kernels", action="store_true", help="compile nothing, not even elementwise kernels")
    parser.add_argument("--batch", type=int, help="the examples' own unless given")
    parser.add_argument("--samples", type=int, nargs="*", default=(1, 2, 3, 4, 16), help="of Monte Carlo; 16 of DC-VAE: 20 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=("wall", "process"), help="process: for a shared machine")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where figures go, in the place of a model's earlier ones")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the table of the --json file as Markdown")
    parser.add_argument("--gate", type=float, help="exit with 1 where a converted training step takes more than this")
    args = parser.parse_args()
    if args.table:
        print(markdown(json.loads(args.json.read_text())))
        return
    if args.device == "cuda":
        args.compile = args.variance_bf16 = True
    torch.set_num_threads(args.threads)
    if args.no_kernels:
        rvconvert.moments.compilation.disable()
    console = Console(width=None if sys.stdout.isatty() else 150)
    measured = []
    for dtype in args.dtypes or (("tf32", "bf16") if args.device == "cuda" else ("fp32",)):
        args.dtype = dtype
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.dtype != "fp32"
        results = []
        for name in args.models:
            results.append(measure(name, args))
            console.print(f"{name}, {args.dtype} done", style="dim")
            conditions = {"dtype": dtype, "device": args.device, "rounds": args.rounds, "kernels": not args.no_kernels}
            measured.append(results[-1] | conditions)
            if not args.gate:
                add_to(args.json, measured[-1])
        console.print(table(results, args))
    if args.gate:
        slow = {r["model"]: r["rows"]["rvconvert"]["step"] for r in measured}  # type: ignore[index]
        if max(slow.values()) > args.gate:
            raise SystemExit(f"a training step takes more than {args.gate} times the plain one: {slow}")


if __name__ == "__main__":
    main()
