"""Time, memory and arithmetic of a converted model's training step and forward pass, against the plain model's.

    python -m benchmarks.speed                          # on the processor: the published systems and every kind of decoder
    python -m benchmarks.speed --device cuda            # on a GPU: TF32 and bf16 autocast, eager and compiled
    python -m benchmarks.speed --models "GELU 32" GRU   # some of them
    python -m benchmarks.speed --table [--all]          # the README's, or every column, of the figures that these wrote
    python -m benchmarks.speed --models "ReLU 32" --batch 8 --gate 4    # exit code 1 above this ratio; writes nothing

The converted and the plain model run in turn, each in a process of its own, as a person trains one of them. "In one process" they
run in turn too, where each finds the heap as the other left it; so do the other variants, each with the plain model. A figure is
the ratio of the medians of times. Nothing is compiled but in the rows that say so. "Lost" is what the first ten steps took beyond
ten of the later ones, conversion included. The FLOPs of a step, over the plain one's, are what an ideal program would take.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rvconvert
from benchmarks.decoders import ACTIVATIONS, MODELS, SPELLED, SYSTEMS, sequential
from benchmarks.memory import kept_for_backward
from benchmarks.naive import NaiveDecoder

Run = Callable[[], Tensor]
RESULTS = Path(__file__).resolve().parent / "results" / "speed.json"
WARM = 5  # steps before any is timed
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def loss_of(out: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).mean()
    return (out.float() - x).square().mean() + 1e-3 * kl.float()


def step_of(model: nn.Module, x: Tensor) -> Run:
    """A forward pass with its loss."""

    def run() -> Tensor:
        out, mu, logvar = model(x)
        return loss_of(out, x, mu, logvar)

    return run


def variants(plain: nn.Module, x: Tensor, args: argparse.Namespace) -> dict[str, Run]:
    """Every variant's forward pass with its loss, the converted one aside."""
    made: dict[str, Run] = {}
    if args.covariances:
        for mode in args.covariances:
            made[mode] = step_of(rvconvert.convert(plain, covariance=mode), x)
    if args.variance_bf16:
        made["variance in bfloat16"] = step_of(rvconvert.convert(plain, variance_dtype=torch.bfloat16), x)
    if args.compile:
        converted = rvconvert.convert(plain, example_inputs=x)
        for name, model in (("plain, compiled", copy.deepcopy(plain)), ("rvconvert, compiled", converted)):
            made[name] = step_of(torch.compile(model, mode=args.mode), x)
    for count in args.samples:
        made[f"{count} sample{'s' * (count > 1)}"] = lambda count=count: sampled(plain, x, count)
    layers = sequential(plain)
    if layers is not None:
        naive = NaiveDecoder(layers)

        def naive_step() -> Tensor:
            mu, logvar = plain.encode(x)
            out, var = naive(mu, logvar.exp())
            return loss_of(out, x, mu, logvar) + 50.0 * var.square().mean()

        made["naive"] = naive_step
        with contextlib.suppress(ImportError):
            made["fastbnns"] = fastbnns_step(plain, layers, x)
    return made


def sampled(plain: nn.Module, x: Tensor, count: int) -> Tensor:
    mu, logvar = plain.encode(x)
    z = (mu + torch.randn(count, *mu.shape, device=mu.device) * torch.exp(0.5 * logvar)).flatten(0, 1)
    return loss_of(plain.decode(z).unflatten(0, (count, -1)).mean(0), x, mu, logvar)


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

    def __init__(self, args: argparse.Namespace, parameters: list[Tensor]) -> None:
        self.args, self.parameters, self.cuda = args, parameters, args.device == "cuda"
        self.clock = time.process_time if args.clock == "process" else time.perf_counter

    def once(self, run: Run, train: bool = True) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        start = self.clock()
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.dtype == "bf16"), torch.set_grad_enabled(train):
            loss = run()
        if train:
            loss.backward()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = self.clock() - start
        for p in self.parameters:
            p.grad = None
        return seconds

    def ratio(self, plain: Run, run: Run, train: bool = True) -> tuple[float, float]:
        """Of the medians, timed in turn; and the plain median in seconds."""
        self.once(run, train)
        pairs = [(self.once(plain, train), self.once(run, train)) for _ in range(self.args.rounds)]
        base, own = (statistics.median(each) for each in zip(*pairs, strict=True))
        return own / base, base

    def memory(self, run: Run) -> float:
        """Bytes: the peak on a GPU; on the processor, what a step keeps for its backward pass, each storage once."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.once(run)
            return float(torch.cuda.max_memory_allocated())
        return kept_for_backward(run)


def flops(run: Run) -> float:
    with FlopCounterMode(display=False) as counter:
        run().backward()
    return float(counter.get_total_flops())


def prepared(name: str, args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The plain model and its input; settings of this process as asked."""
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.dtype != "fp32"
    torch.manual_seed(0)
    build, shape, batch = MODELS[name]
    return build().to(args.device), torch.rand(args.batch or batch, *shape, device=args.device)


def in_a_process(target: Callable[..., None], *args: object) -> tuple[SpawnProcess, Connection]:
    """A process of its own that runs ``target(pipe, *args)``, and the other end of the pipe."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=target, args=(other, *args))
    process.start()
    other.close()
    return process, pipe


def received(process: SpawnProcess, pipe: Connection, name: str) -> Any:
    """What the process sends; the end of the program if it has ended."""
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{name}: the process that measured it ended with {process.exitcode}") from None


def alone(pipe: Connection, name: str, args: argparse.Namespace, converted: bool) -> None:
    """Time a training step ("step") or a forward pass in eval mode ("forward") of one model whenever one is asked for."""
    model, x = prepared(name, args)
    model = rvconvert.convert(model) if converted else model
    meter, run = Meter(args, list(model.parameters())), step_of(model, x)
    while what := pipe.recv():
        model.train(what == "step")
        pipe.send(meter.once(run, train=what == "step"))


def in_turns(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Converted over plain, each in a process of its own, one step of either at a time."""
    started = [in_a_process(alone, name, args, converted) for converted in (False, True)]

    def once(what: str) -> list[float]:
        seconds = []
        for process, pipe in started:
            pipe.send(what)
            seconds.append(received(process, pipe, name))
        return seconds

    found: dict[str, float] = {}
    for what in ("step", "forward"):
        for _ in range(WARM):
            once(what)
        rounds = args.rounds if what == "step" else 4 * args.rounds  # a pass takes a quarter of a step's time
        base, own = (statistics.median(each) for each in zip(*[once(what) for _ in range(rounds)], strict=True))
        found |= {what: own / base} | ({"plain_seconds": base} if what == "step" else {})
    for process, pipe in started:
        pipe.send("")
        process.join()
    return found


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """All other figures of one model, in a process that has done nothing else."""
    plain, x = prepared(name, args)
    meter = Meter(args, list(plain.parameters()))
    base = step_of(plain, x)
    for _ in range(2):
        meter.once(base)
    start = time.perf_counter()
    converted = rvconvert.convert(plain)
    run = step_of(converted, x)
    for _ in range(10):
        meter.once(run)
    first_ten = time.perf_counter() - start
    ratio, seconds = meter.ratio(base, run)
    row: dict[str, object] = {"together": ratio, "lost": max(0.0, first_ten - 10 * ratio * seconds)}
    if args.clock == "process":
        del row["lost"]
    row["flops"], row["memory"] = flops(run) / flops(base), meter.memory(run) / meter.memory(base)
    others: dict[str, float | str] = {}
    for variant, other in variants(plain, x, args).items() if name in SYSTEMS or args.peers or args.covariances else ():
        try:
            others[variant] = meter.ratio(base, other)[0]
        except Exception as error:
            others[variant] = f"{type(error).__name__}: {error}".splitlines()[0][:90]
    conditions = {"device": args.device, "dtype": args.dtype, "threads": args.threads, "rounds": args.rounds}
    conditions["memory_kept"] = args.keep_memory
    return {"model": name, "batch": len(x), **row, "others": others, **conditions}


def _send_measured(pipe: Connection, name: str, args: argparse.Namespace) -> None:
    pipe.send(measure(name, args))


def figures(name: str, args: argparse.Namespace) -> dict[str, object]:
    """All figures of one model."""
    process, pipe = in_a_process(_send_measured, name, args)
    found = received(process, pipe, name)
    process.join()
    return found | in_turns(name, args)


COLUMNS = {
    "step": "converted",
    "together": "in one process",
    "flops": "FLOPs",
    "memory": "memory",
    "forward": "forward",
    "lost": "s lost",
}
PEERS = {"2 samples": "2 samples", "naive": "naive", "fastbnns": "fastbnns"}


def cells(row: dict[str, object], columns: dict[str, str], peers: dict[str, str]) -> list[str]:
    values = [row.get(key) for key in columns] + [row["others"].get(key) for key in peers]  # type: ignore[attr-defined]
    return ["" if v is None else v if isinstance(v, str) else f"{v:.2f}" for v in values]


def table(rows: list[dict[str, object]]) -> Table:
    made = Table(title="Times over the plain model's (what follows the second column)")
    for heading in ("model, batch", "plain step", *COLUMNS.values(), "others"):
        made.add_column(heading, justify="left" if heading in ("model, batch", "others") else "right")
    for row in rows:
        others = (f"{k} {v if isinstance(v, str) else f'{v:.2f}'}" for k, v in row["others"].items())  # type: ignore[attr-defined]
        name, plain = f"{row['model']}, {row['batch']} ({row['device']}, {row['dtype']})", f"{1e3 * row['plain_seconds']:.0f} ms"  # type: ignore[operator]
        made.add_row(name, plain, *cells(row, COLUMNS, {}), ", ".join(others))
    return made


def markdown(rows: list[dict[str, object]], *, every: bool) -> str:
    """The README's table: of the ten activations the best and the worst at each size, of those that models spell the worst.

    With ``every``, all rows and columns.
    """
    rows = [row for row in rows if every or not row["memory_kept"]]
    columns = COLUMNS if every else {k: COLUMNS[k] for k in ("step", "together", "flops", "memory", "lost")}
    peers = PEERS if every else {k: PEERS[k] for k in ("2 samples", "naive")}
    by_size: dict[str, list[dict[str, object]]] = {}
    of_ten = [row for row in rows if str(row["model"]).rpartition(" ")[0] in ACTIVATIONS]
    for row in of_ten:
        by_size.setdefault(f"{row['model']}"[-2:] + f"{row['device']}{row['dtype']}{row['memory_kept']}", []).append(row)
    chosen = {id(f(group, key=lambda r: r["step"])) for group in by_size.values() for f in (min, max)}  # type: ignore[arg-type,return-value]
    spelled = [row for row in rows if str(row["model"]).rpartition(" ")[0] in SPELLED]
    chosen |= {id(max(spelled, key=lambda r: r["step"]))} if spelled else set()  # type: ignore[arg-type,return-value]
    lines = [f"| model, batch | plain step | {' | '.join((*columns.values(), *peers.values()))} |"]
    lines.append("| --- |" + " ---: |" * (1 + len(columns) + len(peers)))
    for row in rows:
        sized = str(row["model"])[-2:].isdigit()
        if not every and row in of_ten + spelled and id(row) not in chosen:
            continue
        name = f"{row['model']}×{row['model'][-2:]}" if sized else row["model"]  # type: ignore[index]
        plain = f"{1e3 * row['plain_seconds']:.0f} ms"  # type: ignore[operator]
        where = "" if row["device"] == "cpu" else f" ({row['device']}, {row['dtype']})"
        where += " (memory kept)" if row["memory_kept"] else ""
        lines.append(f"| {name}, {row['batch']}{where} | {plain} | {' | '.join(cells(row, columns, peers))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    dtypes = ("fp32", "tf32", "bf16")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, help="bf16: autocast; default fp32, on a GPU tf32 and bf16")
    parser.add_argument("--covariances", nargs="*", default=(), metavar="MODE", help="also these covariance modes")
    parser.add_argument("--variance-bf16", action="store_true", help="also variance_dtype=torch.bfloat16; always on a GPU")
    parser.add_argument("--compile", action="store_true", help="also both models through torch.compile; always on a GPU")
    parser.add_argument("--mode", default=None, help="torch.compile's mode, for instance reduce-overhead")
    parser.add_argument("--batch", type=int, help="the models' own unless given")
    parser.add_argument("--samples", type=int, nargs="*", default=(2,), help="of Monte Carlo")
    parser.add_argument("--peers", action="store_true", help="the other variants for every model, not for the systems alone")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep-memory", action="store_true", help="let malloc (glibc) keep what a step frees for the next one")
    parser.add_argument("--clock", default="wall", choices=("wall", "process"), help="process: for a shared machine")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where figures go, in the place of a model's earlier ones")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the table of the --json file as Markdown")
    parser.add_argument("--all", action="store_true", help="with --table: every row and column")
    parser.add_argument("--gate", type=float, help="exit with 1 where a converted training step takes more than this")
    args = parser.parse_args()
    if args.table:
        print(markdown(json.loads(args.json.read_text()), every=args.all))
        return
    if args.keep_memory:
        os.environ.update(KEPT)
    if args.device == "cuda":
        args.compile = args.variance_bf16 = True
    console = Console(width=170)
    measured = []
    for dtype in args.dtypes or (("tf32", "bf16") if args.device == "cuda" else ("fp32",)):
        for name in args.models:
            measured.append(figures(name, argparse.Namespace(**vars(args) | {"dtype": dtype})))
            console.print(f"{name}, {dtype}: {measured[-1]['step']:.2f}", style="dim")
            if not args.gate:
                held = json.loads(args.json.read_text()) if args.json.exists() else []
                same = ("model", "dtype", "device", "threads", "memory_kept")
                held = [r for r in held if any(r[key] != measured[-1][key] for key in same)] + [measured[-1]]
                order = list(MODELS)
                held.sort(key=lambda r: (r["memory_kept"], order.index(r["model"])))
                args.json.write_text(json.dumps(held, indent=1) + "\n")
    console.print(table(measured))
    slow = {row["model"]: row["step"] for row in measured if args.gate and row["step"] > args.gate}
    if slow:
        raise SystemExit(f"a training step takes more than {args.gate} times the plain one: {slow}")


if __name__ == "__main__":
    main()
