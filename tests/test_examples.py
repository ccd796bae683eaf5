"""Every example runs, learns and writes its files; the image sets load from the standard downloads."""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rvconvert

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
# What a dozen steps lower. The adversarial systems' losses pull against each other and need not fall; and at
# the start of the converted Soft-IntroVAE it is L_c that weighs most.
FALLS = {
    "vae": "loss",
    "beta_tcvae": "loss",
    "dc_vae": "discriminator",
    "soft_intro_vae": "reconstruction",
    "soft_intro_vae --rv": "penalty",
}
sys.path[:0] = [str(EXAMPLES), str(ROOT)]

import common  # noqa: E402
import dc_vae  # noqa: E402
import image_sets  # noqa: E402
from beta_tcvae import log_normal, log_stratified_weights  # noqa: E402

from benchmarks.paper import report, results, table1  # noqa: E402
from benchmarks.paper.quirks import QUIRKS  # noqa: E402


@pytest.fixture(autouse=True)
def modules_of_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of the guide, which another test may have run, import a module ``vae`` of their own."""
    for system in ("vae", "beta_tcvae", "dc_vae", "soft_intro_vae"):
        if system in sys.modules and Path(getattr(sys.modules[system], "__file__", None) or "").parent != EXAMPLES:
            monkeypatch.delitem(sys.modules, system)


def run_in_process(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str | Path) -> None:
    """Run an example as a script would, but with the imports of this process: they cost more than the run."""
    script = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with torch.random.fork_rng():
        runpy.run_path(str(script), run_name="__main__")


def run_in_shell(name: str, *arguments: str | int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


ON_CIFAR = {"CenterCrop(148), Resize(64)", "L_c on the mean's green channel", "all three of β-TCVAE"}


@pytest.mark.parametrize("name", sorted(QUIRKS.keys() - ON_CIFAR))
def test_a_system_trains_as_the_published_code_has_it(name: str, tmp_path: Path) -> None:
    system = importlib.import_module(QUIRKS[name].cell.split("-")[0])
    with torch.random.fork_rng(), QUIRKS[name].applied():
        system.main(["--smoke", "--rv", "--out", str(tmp_path)])
    assert all(math.isfinite(value) for line in read_metrics(tmp_path) for value in line.values())


def test_the_published_penalty_on_the_green_channel() -> None:
    from beta_tcvae import BetaTCVAE

    x = torch.rand(4, 3, 64, 64)
    for penalty in (50.0, 0.0):
        with QUIRKS["L_c on the mean's green channel"].applied():
            published = rvconvert.convert(BetaTCVAE(), penalty=penalty)
        (0 * published(x)[0]).sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in published.parameters()) == (penalty > 0)


@pytest.mark.parametrize("rv", [False, True], ids=["plain", "rv"])
@pytest.mark.parametrize("system", ["vae", "beta_tcvae", "dc_vae", "soft_intro_vae"])
def test_smoke(system: str, rv: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_process(monkeypatch, system, "--smoke", "--out", tmp_path, *(["--rv"] if rv else []))

    first, last = read_metrics(tmp_path)
    assert all(math.isfinite(value) for value in [*first.values(), *last.values()])
    falls = FALLS.get(f"{system} --rv" if rv else system, FALLS[system])
    assert last[falls] < first[falls]
    assert ("test_mse_rv" in last and last["penalty"] > 0) if rv else "test_mse_rv" not in last
    for grid, rows in (("reconstructions", 3 + rv), ("samples", None)):
        with Image.open(tmp_path / f"{grid}_0002.png") as picture:
            pixels = np.asarray(picture)
        assert pixels.std() > 10, "a blank picture"
        assert rows is None or pixels.shape[0] > rows * 64
    assert not list(tmp_path.glob(".*")), "an unfinished file was left"


@pytest.mark.parametrize("rv", [False, True], ids=["plain", "rv"])
def test_train_vae(rv: bool) -> None:
    output = run_in_shell("train_vae", "--epochs", 2, "--images", 128, "--batch", 32, *(["--rv"] if rv else []))
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in output.splitlines() if "loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0]
    if rv:
        difference = float(output.splitlines()[-1].rpartition(" ")[2])
        assert 0 <= difference < 0.1


def test_the_posterior_of_dc_vae_starts_with_unit_variance() -> None:
    mu, logvar = dc_vae.Encoder(latent_dim=6, in_channels=1, channels=8)(torch.rand(4, 1, 32, 32))
    assert mu.shape == logvar.shape == (4, 6) and mu.std() > 0
    torch.testing.assert_close(logvar, torch.zeros(4, 6))


def test_train_vae_trains_a_converted_model_with_one_line_changed() -> None:
    source = (EXAMPLES / "train_vae.py").read_text()
    assert source.count("rvconvert.convert(") == 1
    loop = source[source.index("optimizer =") : source.index("if args.rv:\n    plain")]
    assert "rv" not in loop


def test_a_resumed_run_continues_as_if_it_had_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is deterministic on a CPU, so the metrics must be equal to the last digit."""

    def train(folder: str, epochs: int, resume: bool = False) -> list[dict[str, float]]:
        options = ["--smoke", "--train-images", "64", "--out", str(tmp_path / folder)]
        monkeypatch.setattr(sys, "argv", ["tiny", *options, *(["--resume"] if resume else [])])
        args = common.parse_arguments(common.argument_parser("tiny"))
        args.epochs = epochs
        model = torch.nn.Linear(32 * 32, 32 * 32)
        optimizer = torch.optim.Adam(model.parameters())
        run = common.Run(args, common.load_data(args), model=model, optimizer=optimizer)

        def decode(z: torch.Tensor) -> torch.Tensor:
            return model(z).view(-1, 1, 32, 32)

        run.views = common.Views(
            encode=lambda x: (x.flatten(1), torch.zeros(len(x), 32 * 32)),
            decode=decode,
            validation_loss=lambda x: run.mse(decode(x.flatten(1)), x),
            samples={"prior": decode},
        )
        for _ in run.epochs():
            for x in run.batches():
                loss = run.mse(decode(x.flatten(1) + torch.randn(len(x), 32 * 32)), x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
            run.end_epoch()
        metrics = read_metrics(args.out)
        return [{name: value for name, value in line.items() if name != "seconds"} for line in metrics]

    whole = train("whole", 3)
    train("parts", 1)
    (tmp_path / "parts" / "metrics.jsonl").open("a").write('{"epoch": 2, "loss": 0.0}\n')  # cut off mid-epoch
    assert train("parts", 3, resume=True) == whole
    with pytest.raises(SystemExit, match="holds a run already"):
        train("parts", 3)


def test_stratified_weights_estimate_a_mean_over_the_data_set() -> None:
    """Each row of weights sums to what N posteriors, averaged, would: 1."""
    weights = log_stratified_weights(batch=8, dataset_size=1000).exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(8))
    torch.testing.assert_close(weights.diagonal(), torch.full((8,), 1e-3))


def test_log_normal_is_the_normal_density() -> None:
    x, mu, logvar = torch.randn(3, 5, 2).unbind(0)
    expected = torch.distributions.Normal(mu, torch.exp(0.5 * logvar)).log_prob(x)
    torch.testing.assert_close(log_normal(x, mu, logvar), expected)


def test_kl_divergence_is_that_of_normals() -> None:
    mu, logvar = torch.randn(2, 5, 3).unbind(0)
    posterior = torch.distributions.Normal(mu, torch.exp(0.5 * logvar))
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(common.kl_divergence(mu, logvar), expected)


def test_mnist_from_idx_files(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, part in (("train", images[:4]), ("t10k", images[4:])):
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, *part.shape)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + part.tobytes())
    train, test = image_sets.load("mnist", tmp_path)
    assert train.shape == (4, 1, 32, 32) and test.shape == (2, 1, 32, 32)
    np.testing.assert_array_equal(train[:, 0, 2:-2, 2:-2], images[:4])
    assert image_sets.load("mnist", tmp_path, size=64)[0].shape == (4, 1, 64, 64)


def python2_batch(rows: np.ndarray) -> bytes:
    """A CIFAR-10 batch as the download has it: written by Python 2 and a NumPy of its time."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"J" + struct.pack("<i", rows.shape[0]) + b"J" + struct.pack("<i", rows.shape[1]) + b"\x86"
    content = b"T" + struct.pack("<i", rows.nbytes) + rows.tobytes()
    return b"\x80\x02}(U\x04data" + array + b"(K\x01" + shape + dtype + b"\x89" + content + b"tbu."


def test_cifar10_from_pickled_batches(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, part in zip(names, np.split(images.reshape(12, -1), 6), strict=True):
        (folder / name).write_bytes(python2_batch(part))
    train, test = image_sets.load("cifar10", tmp_path)
    np.testing.assert_array_equal(train, images[:10])
    np.testing.assert_array_equal(test, images[10:])


def test_a_hostile_cifar10_batch_runs_no_code(tmp_path: Path) -> None:
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path).encode() + b"/ran'\ntR.")
    with pytest.raises(pickle.UnpicklingError, match=r"os\.system|posix\.system"):
        image_sets.load("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_faces_are_cropped_and_split_by_the_partition_file(tmp_path: Path) -> None:
    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    pixels = np.zeros((218, 178, 3), dtype=np.uint8)
    pixels[35:183, 15:163] = 255  # the centre crop is white, the rest black
    for i in range(10):
        Image.fromarray(pixels).save(folder / f"{i:06d}.png")
    train, test = image_sets.load("celeba", tmp_path)
    assert train.shape == (9, 3, 64, 64) and test.shape == (1, 3, 64, 64)
    assert train[..., 1:-1, 1:-1].min() == 255  # the filter of the outermost pixels reaches beyond the crop
    assert train.min() > 127
    lines = [f"{i:06d}.png {0 if i < 3 else 1 if i < 5 else 2}" for i in range(10)]
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("\n".join(lines))
    assert [len(part) for part in image_sets.load("faces", tmp_path)] == [3, 5]


def test_a_missing_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz"):
        image_sets.load("mnist", tmp_path)


def test_the_papers_tables_are_made_of_their_json_files() -> None:
    folder = report.cells.HERE / "results"
    readme = report.README.read_text()
    for name, table in report.TABLES.items():
        if records := results.read(folder, name):
            assert (folder / f"{name}.md").read_text() == table(records)
            assert report.embedded(table(records)) in readme, f"{name}: python -m benchmarks.paper.report"


def test_a_cell_of_table_1_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--cells vae-digits --variants plain,rv --epochs 1 --images 96 --test-images 32 --shrink 16 --seeds 1 --batch 32"
    monkeypatch.setattr(sys, "argv", ["table1", *options.split(), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)])
    with torch.random.fork_rng():
        table1.main()
    plain, rv = results.read(tmp_path, "table1")
    assert (plain["variant"], rv["variant"]) == ("plain", "rv")
    assert all(math.isfinite(rv[name]) for name in ("mse_rv", "mse_mean", "mse_sample", "mse_between_rv_and_mean", "kl"))
    assert "mse_rv" not in plain and {"mse_mean", "mse_sample", "kl"} <= set(plain)
    assert f"{rv['mse_rv']:.4f}" in (tmp_path / "table1.md").read_text()
    monkeypatch.setattr(table1.cells, "train", lambda *_: pytest.fail("trained again"))
    table1.main()


def test_a_claim_is_confirmed_only_against_the_mean() -> None:
    plain = {"mse_mean": 0.2, "mse_sample": 0.4, "epochs": 10, "trained_on": 1900, "batch": None}
    claims = {0.1: "confirmed", 0.3: "only under the paper's protocol", 0.5: "not confirmed"}
    for mse, claim in claims.items():
        assert table1.verdict([(plain, {"mse_rv": mse})]) == claim
    assert table1.verdict([(plain, {"mse_rv": 0.1}), (plain, {"mse_rv": 0.3})]) == "only under the paper's protocol"
    assert results.updates(plain) == 300
    assert table1.verdict([(plain | {"epochs": 9}, {"mse_rv": 0.1})]) == "too short to tell"
