"""The command line: what each command does, its exit codes, and that every refusal is one clear message."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rvconvert
from rvconvert.cli.images import read_images
from rvconvert.cli.main import main
from rvconvert.files import checkpoint
from rvconvert.files.recipe import import_class

MODEL = """
import torch
from torch import nn


class VAE(nn.Module):
    def __init__(self, size=6, latent_dim=2):
        super().__init__()
        if latent_dim < 1:
            raise ValueError("latent_dim must be at least 1")
        self.encoder = nn.Linear(size, 2 * latent_dim)
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 8), nn.ReLU(), nn.Linear(8, size))

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)), mu, logvar


class Odd(VAE):
    def forward(self, x):
        recon, mu, logvar = super().forward(x)
        return torch.linalg.qr(recon)[0], mu, logvar


class Images(VAE):
    def __init__(self):
        super().__init__(size=3 * 4 * 4)

    def forward(self, x):
        recon, mu, logvar = super().forward(x.flatten(1))
        return recon.view(-1, 3, 4, 4), mu, logvar


def helper():
    pass
"""


TOKENS = """
import torch
from torch import nn


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.encoder, self.decoder = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(2, 10)

    def forward(self, tokens):
        mu, logvar = self.encoder(self.embedding(tokens)).chunk(2, -1)
        return self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)), mu, logvar
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model's file and its plain weights, for latent_dim=3."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "net.py").write_text(MODEL)
    torch.manual_seed(0)
    checkpoint.write(import_class("net.py:VAE")(latent_dim=3).state_dict(), tmp_path / "plain.pt")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], command: str) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        code = main(shlex.split(command))
    except SystemExit as exit:
        code = int(exit.code or 0)
    return code, *capsys.readouterr()


CONVERT = """convert net.py:VAE plain.pt rv.pt --kwargs '{"latent_dim": 3}' --example-shape 4,6"""


def test_there_and_back(folder: Path, capsys) -> None:
    code, out, err = run(capsys, CONVERT + " --penalty 5")
    assert code == 0 and not err and "rv.pt: VAE, 6 entries" in out and "next: rvconvert verify" in out
    rv = rvconvert.load("rv.pt", model="net.py:VAE")
    assert rv._rvconvert.options.penalty == 5
    code, out, err = run(capsys, "transfer rv.pt back.safetensors --model net.py:VAE")
    assert code == 0 and not err and "fit net.py:VAE" in out
    before, after = checkpoint.read("plain.pt").state, checkpoint.read("back.safetensors").state
    assert set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert run(capsys, "transfer rv.pt back.pt")[0] == 0
    import_class("net.py:VAE")(latent_dim=3).load_state_dict(torch.load("back.pt", weights_only=True), strict=True)


def test_json_holds_the_same_as_the_text(folder: Path, capsys) -> None:
    data = json.loads(run(capsys, CONVERT + " --json")[1])
    assert data["entries"] == 6 and data["options"]["penalty"] == 50 and data["out"] == "rv.pt"
    assert json.loads(run(capsys, "transfer rv.pt back.pt --json")[1])["entries"] == 6

    planned = "plan net.py:VAE --example-shape 4,6"
    report = rvconvert.plan(import_class("net.py:VAE")(), example_inputs=torch.rand(4, 6))
    assert json.loads(run(capsys, planned + " --json")[1]) == json.loads(json.dumps(report.to_dict()))
    text = run(capsys, planned)[1]
    for row in report:
        assert row.operation in text and row.where in text

    rules = json.loads(run(capsys, "rules --json")[1])["rules"]
    assert [r["operation"] for r in rules] == [r.name for r in rvconvert.REGISTRY]
    assert json.loads(run(capsys, "rules conv2d --json")[1])["rules"][0]["modules"] == ["Conv2d"]
    assert "conv_transpose2d" in run(capsys, "rules conv")[1]


def test_plan_of_what_cannot_be_converted(folder: Path, capsys) -> None:
    code, out, _ = run(capsys, "plan net.py:Odd --strict --example-shape 4,6")
    assert code == 1 and "NO RULE" in out and "@rvconvert.rule(torch.linalg" in out
    code, out, err = run(capsys, "convert net.py:Odd plain.pt rv.pt --kwargs '{\"latent_dim\": 3}' --strict --example-shape 4,6")
    assert code == 1 and not out and "net.py:" in err and "Traceback" not in err
    assert not (folder / "rv.pt").exists()


def test_lightning_hyper_parameters_construct_the_model(folder: Path, capsys) -> None:
    state = checkpoint.read("plain.pt").state
    content = {"hyper_parameters": {"latent_dim": 3, "lr": 0.1}, "state_dict": {f"model.{k}": v for k, v in state.items()}}
    torch.save(content, "light.ckpt")
    code, out, _ = run(capsys, "convert net.py:VAE light.ckpt rv.pt")
    assert code == 0 and "took the prefix 'model.' off" in out and "constructed with {'latent_dim': 3}" in out
    assert rvconvert.load("rv.pt").encoder.out_features == 6


def test_the_constructors_arguments_are_taken_from_the_checkpoint_if_asked(folder: Path, capsys) -> None:
    content = {"hyper_parameters": {"latent_dim": 3, "lr": 0.1}, "state_dict": checkpoint.read("plain.pt").state}
    torch.save(content, "light.ckpt")
    command = "convert net.py:VAE light.ckpt rv.pt --kwargs from-checkpoint"
    assert "constructed with {'latent_dim': 3}" in run(capsys, command)[1]
    code, _, err = run(capsys, "plan net.py:VAE --checkpoint plain.pt --kwargs from-checkpoint")
    assert code == 1 and "plain.pt holds none: give them as JSON" in err
    assert run(capsys, "plan net.py:VAE --checkpoint light.ckpt --kwargs from-checkpoint --example-shape 4,6")[0] == 0
    torch.save({**content, "state_dict": import_class("net.py:Images")().state_dict()}, "images.ckpt")
    command = "convert net.py:Images images.ckpt rv.pt --kwargs from-checkpoint --covariance calibrated --force"
    assert run(capsys, command)[0] == 0
    np.save("images.npy", np.random.default_rng(0).random((8, 3, 4, 4)).astype("float32"))
    for other in ("calibrate rv.pt --pairs 1", "verify rv.pt --samples 20"):
        code, _, err = run(capsys, f"{other} --images images.npy --model net.py:Images --kwargs from-checkpoint")
        assert code == 0, err


def test_a_key_chooses_among_several_state_dicts(folder: Path, capsys) -> None:
    state = checkpoint.read("plain.pt").state
    torch.save({"raw": state, "ema": {"shadow": {k: v + 1 for k, v in state.items()}}}, "both.pt")
    code, _, err = run(capsys, CONVERT.replace("plain.pt", "both.pt"))
    assert code == 1 and "raw (6 entries), ema.shadow (6 entries)" in " ".join(err.split())
    assert run(capsys, CONVERT.replace("plain.pt", "both.pt") + " --key ema.shadow")[0] == 0
    taken = checkpoint.read("rv.pt").state
    assert all(torch.equal(taken[k], state[k] + 1) for k in state)
    torch.save({"model": state, "ema": {k: v + 1 for k, v in state.items()}}, "averaged.pt")
    assert "other weights of the same names, --key ema" in run(capsys, CONVERT.replace("plain.pt", "averaged.pt") + " --force")[1]


def test_weights_that_are_no_numbers_are_named(folder: Path, capsys) -> None:
    state = checkpoint.read("plain.pt").state
    state["encoder.bias"][0] = float("nan")
    checkpoint.write(state, "broken.pt")
    assert "note: NaN or infinite: encoder.bias;" in run(capsys, CONVERT.replace("plain.pt", "broken.pt"))[1]


def test_tokens_are_asked_for_as_integers(folder: Path, capsys) -> None:
    (folder / "tokens.py").write_text(TOKENS)
    code, _, err = run(capsys, "plan tokens.py:VAE --example-shape 4,7")
    assert code == 1 and "such as tokens: --example-shape 4,7:int64" in " ".join(err.split())
    assert run(capsys, "plan tokens.py:VAE --example-shape 4,7:int64")[0] == 0
    vae = import_class("tokens.py:VAE")()
    checkpoint.write(vae.state_dict(), "tokens.pt")
    code, out, _ = run(capsys, "convert tokens.py:VAE tokens.pt rv_tokens.pt --example-shape 4,7:int64")
    command = " ".join(out.partition("next: rvconvert ")[2].split())
    assert code == 0 and command.endswith("--example-shape 4,7:int64")
    assert run(capsys, f"{command} --samples 20")[0] == 0


def test_a_shells_completion_is_printed(capsys) -> None:
    pytest.importorskip("shtab")
    code, out, _ = run(capsys, "--print-completion bash")
    assert code == 0 and "rvconvert" in out and "--covariance" in out


def test_nothing_is_overwritten_without_force(folder: Path, capsys) -> None:
    assert run(capsys, CONVERT)[0] == 0
    before = (folder / "rv.pt").read_bytes()
    code, _, err = run(capsys, CONVERT)
    assert code == 1 and "--force" in err and (folder / "rv.pt").read_bytes() == before
    assert run(capsys, CONVERT + " --force --penalty 1")[0] == 0
    assert (folder / "rv.pt").read_bytes() != before
    assert run(capsys, "transfer rv.pt plain.pt")[0] == 1


REFUSED = {
    "no colon": ("plan net", "'net' is not a model; a model is 'package.module:Class' or 'path/file.py:Class'"),
    "no class": ("plan net.py", "'net.py' names no class; add it: 'net.py:ClassName'"),
    "no file": ("plan nett.py:VAE", "nett.py: no such file; did you mean 'net.py'?"),
    "no module": ("plan no_package.net:VAE", "no module 'no_package'"),
    "misspelt class": ("plan net.py:VEA", "net.py has no class 'VEA'; did you mean 'VAE'?"),
    "not a module": ("plan net.py:helper", "net.py:helper is not a torch.nn.Module class"),
    "broken file": ("plan broken.py:VAE", "importing broken.py failed: ZeroDivisionError: division by zero (broken.py:2)"),
    "missing import": ("plan needy.py:VAE", "importing needy.py failed: ModuleNotFoundError: No module named 'no_such_thing'"),
    "exiting file": ("plan exiting.py:VAE", "importing exiting.py failed: SystemExit: 3 (exiting.py:1); what reads the"),
    "unknown argument": (
        """plan net.py:VAE --kwargs '{"latent": 3}'""",
        "VAE(latent=3) failed: TypeError: VAE.__init__() got an unexpected keyword argument 'latent'. Its "
        "arguments: VAE(size=6, latent_dim=2)",
    ),
    "refused argument": (
        """plan net.py:VAE --kwargs '{"latent_dim": 0}'""",
        "VAE(latent_dim=0) failed: ValueError: latent_dim must be at least 1 (net.py:10)",
    ),
    "wrong shape": ("plan net.py:VAE --example-shape 4,7", "the model failed on (4, 7): RuntimeError: mat1 and mat2"),
    "no method": ("plan net.py:VAE --methods decode --example-shape 4,6", "VAE has no method 'decode'"),
    "weights that do not fit": ("convert net.py:VAE plain.pt rv.pt", "plain.pt: weights do not fit VAE"),
    "weights of other arguments": ("convert net.py:VAE plain.pt rv.pt", """--kwargs '{"size": 6}', with theirs"""),
    "missing checkpoint": ("convert net.py:VAE no.pt rv.pt", "no.pt: no such file"),
    "a folder": ("convert net.py:VAE . rv.pt", "is a folder"),
    "hostile checkpoint": ("convert net.py:VAE evil.pt rv.pt", "--allow-pickle"),
    "wrong name": ("convert net.py:VAE plain.pt rv.onnx", "must end in .pt or .pth or .safetensors"),
    "converted twice": ("convert net.py:VAE rv0.pt rv.pt", "holds a converted model already"),
    "transfer of plain": ("transfer plain.pt back.pt", "holds plain weights already"),
    "verify of plain": ("verify plain.pt --model net.py:VAE --example-shape 4,6", "rvconvert convert MODEL"),
    "verify on nothing": ("verify rv0.pt --model net.py:VAE", "give --images PATH or --example-shape"),
    "verify on no images": ("verify rv0.pt --model net.py:VAE --images photos", "photos: images come as"),
    "unknown rule": ("rules flux_capacitor", "no rule for 'flux_capacitor'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_message_and_exit_1(case: str, folder: Path, capsys) -> None:
    command, message = REFUSED[case]
    (folder / "broken.py").write_text("import torch\n1 / 0\n")
    (folder / "needy.py").write_text("import no_such_thing\n")
    (folder / "exiting.py").write_text("raise SystemExit(3)\n")
    torch.save(import_class("net.py:VAE")(), "evil.pt")
    rvconvert.save(rvconvert.convert(import_class("net.py:VAE")()), "rv0.pt", kwargs={})
    code, out, err = run(capsys, command)
    assert code == 1 and not out
    assert err.startswith("error: ") and message in " ".join(err.split()), err
    assert "Traceback" not in err
    assert not (folder / "rv.pt").exists() and not (folder / "back.pt").exists()


def test_a_file_that_reads_the_command_line_is_pointed_to(folder: Path, capsys) -> None:
    (folder / "parsing.py").write_text("import argparse\nparser = argparse.ArgumentParser()\nparser.parse_args(['--data'])\n")
    code, _, err = run(capsys, "plan parsing.py:VAE")
    assert code == 1 and "SystemExit: 2 (parsing.py:3); what reads the command line belongs below" in " ".join(err.split())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "COMMAND"),
        ("bake", "invalid choice"),
        ("plan", "MODEL"),
        ("plan net.py:VAE --kwargs {latent_dim:3}", "is not JSON"),
        ("plan net.py:VAE --kwargs [3]", "is not a JSON object"),
        ("plan net.py:VAE --example-shape 4x6", "is not a shape; write 4,3,64,64"),
        ("plan net.py:VAE --example-shape 4,0", "is not a shape"),
        ("plan net.py:VAE --covariance quantum", "invalid choice"),
        ("verify rv.pt --samples 0", "not a whole number above 0"),
        ("verify rv.pt --range 1", "expected 2 arguments"),
    ],
)
def test_wrong_usage_is_exit_2(command: str, message: str, folder: Path, capsys) -> None:
    code, out, err = run(capsys, command)
    assert code == 2 and not out and message in err


def test_a_recipe_may_be_trusted(folder: Path, capsys, monkeypatch) -> None:
    assert run(capsys, CONVERT)[0] == 0
    command = [sys.executable, "-m", "rvconvert", "verify", "rv.pt", "--example-shape", "4,6", "--samples", "10"]
    environment = os.environ | {"PYTHONPATH": str(Path(rvconvert.__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and "--model net.py:VAE" in done.stderr
    done = subprocess.run([*command, "--trust-recipe"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_verify_on_images(folder: Path, capsys) -> None:
    vae = import_class("net.py:Images")()
    rvconvert.save(rvconvert.convert(vae), "rv.pt", model="net.py:Images", kwargs={})
    (folder / "photos").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (8 + i, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    code, _, err = run(capsys, "verify rv.pt --images photos --samples 50")
    assert code == 1 and "--size" in err
    code, out, err = run(capsys, "verify rv.pt --images photos --size 4 --range -1 1 --samples 50")
    assert code == 0 and "decoder.0" in out, err
    data = json.loads(run(capsys, "verify rv.pt --images photos --size 4 --samples 50 --json")[1])
    assert data


def test_verify_of_a_bare_decoder(folder: Path, capsys) -> None:
    decoder = rvconvert.convert(torch.nn.Linear(3, 4), random_inputs=("input",))
    rvconvert.save(decoder, "rv.pt", kwargs={"in_features": 3, "out_features": 4})
    code, _, err = run(capsys, "verify rv.pt --example-shape 16,3 --samples 50")
    assert code == 0, err


def test_images_are_read_in_every_form(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    expected = torch.as_tensor(pixels).movedim(-1, 1) / 255
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(3))
    torch.save(expected, tmp_path / "a.pt")
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.fromarray(pixels[i]).save(tmp_path / "a" / f"{i}.png")
    for name in ("a.npy", "a.npz", "a.pt", "a"):
        torch.testing.assert_close(read_images(tmp_path / name), expected)
    np.save(tmp_path / "grey.npy", pixels[..., 0])
    torch.testing.assert_close(read_images(tmp_path / "grey.npy", count=2), expected[:2, :1])
    np.save(tmp_path / "flat.npy", np.zeros((3, 64)))
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("hello")
    for name in ("flat.npy", "objects.npy", "text.npy", "none.npy", "a.txt"):
        with pytest.raises(rvconvert.ConversionError, match=name):
            read_images(tmp_path / name)


def test_a_closed_pipe_is_no_traceback() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(rvconvert.__file__).parent.parent)}
    command = f"{shlex.quote(sys.executable)} -m rvconvert rules | head -n 2"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, check=False)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_help_names_every_command(capsys) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("demo", "plan", "convert", "transfer", "verify", "rules"):
        assert command in out
        code, text, _ = run(capsys, f"{command} --help")
        assert code == 0 and f"Example: rvconvert {command}" in " ".join(text.split())


def test_calibrate_rewrites_the_file_whole_or_not_at_all(folder: Path, capsys) -> None:
    vae = import_class("net.py:Images")()
    rvconvert.save(rvconvert.convert(vae, covariance="calibrated"), "rv.pt", model="net.py:Images", kwargs={})
    np.save("images.npy", np.random.default_rng(0).random((24, 3, 4, 4)).astype("float32"))
    np.save("other.npy", np.zeros((4, 3, 9, 9), "float32"))
    before = Path("rv.pt").read_bytes()
    code, _, err = run(capsys, "calibrate rv.pt --images other.npy --pairs 2")
    assert code == 1 and "(4, 3, 9, 9)" in err and Path("rv.pt").read_bytes() == before
    code, out, err = run(capsys, "calibrate rv.pt --images images.npy --pairs 4 --count 20")
    assert code == 0 and "ratio after" in out and "20 samples" in out and "rv.pt: rewritten" in out, err
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in checkpoint.read("rv.pt").state.items())
    model = rvconvert.load("rv.pt").eval()
    gains = model.__dict__["_rvconvert"].gains
    assert gains.evaluation and not gains.stale
    code, out, _ = run(capsys, "calibrate rv.pt --images images.npy --pairs 1 --json")
    assert code == 0 and json.loads(out)["rows"][0]["operation"] == "Linear"
    code, out, _ = run(capsys, "verify rv.pt --images images.npy --samples 30")
    assert code == 0 and "calibrated: the propagated variance" in out

    rvconvert.save(rvconvert.convert(vae), "independent.pt", model="net.py:Images", kwargs={})
    code, _, err = run(capsys, "calibrate independent.pt --images images.npy")
    assert code == 1 and "covariance='independent'" in err and "--covariance calibrated" in err


def test_plan_says_what_convert_would_refuse(tmp_path, monkeypatch, capsys):
    (tmp_path / "branching.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Branching(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.encoder, self.decoder = nn.Linear(4, 6), nn.Linear(3, 4)\n\n    def forward(self, x):\n"
        "        mu, logvar = self.encoder(x).chunk(2, -1)\n        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)\n"
        "        return self.decoder(z) if z.mean() > 0 else self.decoder(-z)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "branching.py:Branching", "--example-shape", "5,4"]) == 1
    shown = capsys.readouterr().out
    assert "convert refuses this" in shown and "branching.py:13" in shown
    assert main(["plan", "branching.py:Branching"]) == 1
    assert "give --example-shape" in capsys.readouterr().err


def test_an_unknown_option_is_refused_by_its_own_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", "m.py:M", "--exmple-shape", "5,4"])
    assert caught.value.code == 2
    assert "rvconvert plan: error" in (error := capsys.readouterr().err) and "did you mean --example-shape?" in error
