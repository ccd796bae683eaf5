"""The demo, end to end: it trains, its files load, its figures are those of its files, its commands work."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rvconvert
from rvconvert.cli import demo
from rvconvert.cli import main as cli


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, demo.Demo]:
    folder = tmp_path_factory.mktemp("demo") / "rvconvert demo"
    return folder, demo.run(folder, epochs=1)


def test_files_are_there_and_load(quick: tuple[Path, demo.Demo]) -> None:
    folder, found = quick
    assert {str(p) for p in folder.iterdir()} >= set(found.files.values())
    for name in ("rv_vae.pt", "rv_vae_sampled.pt"):
        assert isinstance(rvconvert.load(folder / name), demo.DigitVAE)
    plain = demo.DigitVAE()
    plain.load_state_dict(torch.load(folder / "vae.pt", weights_only=True), strict=True)
    with Image.open(folder / "digits.png") as picture:
        assert picture.width > 600 and picture.height > 400
        assert np.asarray(picture).std() > 50
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(found.to_dict()))


def test_figures_are_those_of_the_files(quick: tuple[Path, demo.Demo]) -> None:
    folder, found = quick
    test = torch.from_numpy(demo.load_digits().images).float().unsqueeze(1)[-demo.TEST_IMAGES :] / 16
    rows = {row.model.strip(): row for row in found.rows[:3]}
    rv = rvconvert.load(folder / "rv_vae.pt").eval()
    with torch.no_grad():
        reconstruction, mean, logvar = rv(test)
        error = torch.nn.functional.mse_loss(reconstruction, test).item()
        from_mean = torch.nn.functional.mse_loss(rvconvert.to_plain(rv).eval().decode(mean), test).item()
    assert rows["RV-VAE, independent"].random_variable == pytest.approx(error, rel=1e-5)
    assert rows["transferred to the plain class"].from_mean == pytest.approx(from_mean, rel=1e-5)
    assert rows["RV-VAE, independent"].kl == pytest.approx(demo.kl_divergence(mean, logvar).item(), rel=1e-5)
    untrained = demo.DigitVAE().eval()(test)[0]
    assert error < 0.8 * torch.nn.functional.mse_loss(untrained, test).item()


def test_the_text_holds_the_figures(quick: tuple[Path, demo.Demo]) -> None:
    _, found = quick
    text = rvconvert.render.to_text(found.table(), 120)
    for row in found.rows:
        assert row.model in text
        for value in (row.from_mean, row.from_sample, row.random_variable):
            assert value is None or f"{value:.5f}" in text
    assert len(max(text.splitlines(), key=len)) <= 120


def test_an_earlier_demo_is_not_overwritten(quick: tuple[Path, demo.Demo], capsys) -> None:
    folder, _ = quick
    before = (folder / "digits.png").read_bytes()
    assert cli.main(["demo", "--out", str(folder), "--epochs", "1"]) == 1
    assert "--force" in capsys.readouterr().err
    assert (folder / "digits.png").read_bytes() == before


def test_commands_to_try_next_work_as_they_stand(quick: tuple[Path, demo.Demo], capsys) -> None:
    _, found = quick
    for command in found.commands:
        program, *arguments = shlex.split(command)
        assert program == "rvconvert"
        assert cli.main(arguments) == 0, capsys.readouterr().err
        assert capsys.readouterr().out


def test_training_is_repeatable_and_sees_the_same_batches() -> None:
    """Plain and converted models are trained from the same weights on the same batches in the same order."""
    seen: list[list[torch.Tensor]] = []
    for _ in range(2):
        torch.manual_seed(1)
        vae = demo.DigitVAE()
        batches: list[torch.Tensor] = []
        vae.register_forward_pre_hook(lambda module, args, batches=batches: batches.append(args[0]))
        demo.train(vae, torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(2)), 2, 0, lambda loss: None)
        seen.append([*batches, vae.mean.weight.detach()])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
