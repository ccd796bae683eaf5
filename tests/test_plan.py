"""What ``plan`` prints is held to files, at two widths; run this file to renew them: python -m tests.test_plan."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import rvconvert
from rvconvert.places import short_place
from rvconvert.render import folded_rows, report_table, to_text
from rvconvert.report import Report, Row
from tests.models import SoftIntroDecoder, VanillaVAE

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "plan"
LIBRARY = '''
import torch
from torch import nn


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.projection_of_the_input = nn.Conv2d(width, width, 3, padding=1)
        self.nonlinearity = nn.SiLU()

    def forward(self, hidden_states):
        return hidden_states + self.nonlinearity(self.projection_of_the_input(hidden_states)) * torch.rsqrt(torch.tensor(2.0))


class VAE(nn.Module):
    """As packages write them: sizes taken apart, blocks in a list, names that say everything."""

    def __init__(self, width=8, latent=4):
        super().__init__()
        self.encoder = nn.Conv2d(3, 2 * latent, 4, 4)
        self.post_quant_conv = nn.Conv2d(latent, width, 1)
        self.residual_attention_blocks = nn.ModuleList(ResidualAttentionBlock(width) for _ in range(4))
        self.to_pixels = nn.ConvTranspose2d(width, 3, 4, 4)

    def forward(self, images):
        batch, channels, height, width = images.shape
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        hidden_states = self.post_quant_conv(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
        for block in self.residual_attention_blocks:
            hidden_states = block(hidden_states)
        pixels = self.to_pixels(hidden_states).reshape(batch, channels, height * width)
        return pixels.reshape(batch, channels, height, width), mean, logvar


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.cell, self.readout = nn.Linear(6, 4), nn.GRUCell(2, 8), nn.Linear(8, 3)

    def forward(self, x):
        mean, logvar = self.encoder(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        state = torch.zeros(len(z), 8)
        outputs = []
        for _ in range(29):
            state = self.cell(z, state)
            outputs.append(self.readout(state))
        return torch.stack(outputs, 1), mean, logvar


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, x):
        mean, logvar = self.encoder(x).chunk(2, 1)
        y = self.decoder(mean + torch.randn_like(mean) * torch.exp(0.5 * logvar))
        return torch.linalg.qr(y)[0], mean, logvar
'''

PLANS: dict[str, Callable[[], Report]] = {
    "whole": lambda: rvconvert.plan(VanillaVAE(), example_inputs=torch.rand(4, 3, 16, 16)),
    "third_party": lambda: rvconvert.plan(library("VAE"), example_inputs=torch.rand(2, 3, 16, 16)),
    "loop": lambda: rvconvert.plan(library("Recurrent"), example_inputs=torch.rand(4, 6)),
    "refusal": lambda: rvconvert.plan(library("Odd"), example_inputs=torch.rand(4, 6), strict=True),
    "decoder": lambda: rvconvert.plan(SoftIntroDecoder(), example_inputs=torch.rand(4, 8), random_inputs=("z",)),
}


def library(name: str) -> torch.nn.Module:
    return getattr(importlib.import_module("some_library.models.vae"), name)()


def install_library(folder: Path) -> None:
    """A package where an installer would put it, outside the working folder."""
    models = folder / "site-packages" / "some_library" / "models"
    models.mkdir(parents=True)
    for each in (models, models.parent):
        (each / "__init__.py").touch()
    (models / "vae.py").write_text(LIBRARY.lstrip())


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("environment")
    install_library(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "site-packages")
        patch.chdir(ROOT)
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "some_library"]:
        del sys.modules[name]


def printed(name: str, width: int) -> str:
    """The plan as a person sees it from the project's folder."""
    return to_text(report_table(PLANS[name]()), width=width) + "\n"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", PLANS)
def test_plan_prints_as_in_the_golden_file(name: str, width: int) -> None:
    text = printed(name, width)
    assert text == (GOLDEN / f"{name}_{width}.txt").read_text(encoding="utf-8"), "renew it: python -m tests.test_plan"
    assert all(len(line) <= width for line in text.splitlines() if "rvconvert.RandomVariable(" not in line)


@pytest.mark.parametrize("name", PLANS)
def test_no_place_is_cut_and_no_row_is_without_one(name: str) -> None:
    for width in (66, 80, 100, 120):
        report = PLANS[name]()
        lines = to_text(report_table(report), width=width).splitlines()
        assert all(row.where for row in report)
        assert all(any(line.startswith(row.where) for line in lines) for row in report)
        assert all(any(row.operation in line.split() for line in lines) for row in report), "a name was broken"
        shown = "".join("".join(line.split()) for line in lines)
        assert all("".join(row.source.split()) in shown for row in report)


def test_a_loop_stands_once_with_its_turns() -> None:
    def row(module: str, operation: str = "Linear") -> Row:
        return Row(operation, "random", module, "vae.py:1", rule="linear", exactness="exact")

    def shown(*rows: Row) -> list[tuple[str, str, str]]:
        return [(module, operation, times) for _, (module, operation, _, times) in folded_rows(rows)]

    assert shown(row("a"), row("a"), row("b")) == [("a", "Linear", "×2"), ("b", "Linear", "")]
    assert shown(row("a.0"), row("a.1")) == [("a.0", "Linear", ""), ("a.1", "Linear", "")], "two layers are no loop"
    assert shown(row("a.0"), row("a.1"), row("a.2")) == [("a.0…2", "Linear", "×3")]
    turn = (row("cell", "GRUCell"), row("out"))
    assert shown(*turn * 29, row("last")) == [("cell", "GRUCell", "×29"), ("out", "Linear", "×29"), ("last", "Linear", "")]


def test_places_begin_at_the_working_folder_or_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_library(tmp_path / "lib")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "scripts")])
    monkeypatch.chdir(tmp_path)
    installed = tmp_path / "lib" / "site-packages" / "some_library" / "models" / "vae.py"
    assert short_place(f"{installed}:61") == "some_library/models/vae.py:61"
    assert short_place(f"{tmp_path / 'models' / 'vae.py'}:3") == "models/vae.py:3"
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")
    assert short_place(f"{tmp_path / 'scripts' / 'train.py'}:7") == "train.py:7"
    for untouched in ("models/vae.py:3", "", "<stdin>:1"):
        assert short_place(untouched) == untouched
    assert short_place("/unknown/folder/net.py:1") == "net.py:1"


def test_a_converted_model_exports_and_compiles_whole() -> None:
    x = torch.rand(4, 3, 16, 16)
    rv = rvconvert.convert(VanillaVAE().eval(), example_inputs=x)
    expected = rv(x)[0]
    exported = torch.export.export(rv, (x,)).module()
    torch.testing.assert_close(exported(x)[0], expected)
    compiled = torch.compile(rv, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], expected)


def renew() -> None:
    with tempfile.TemporaryDirectory() as folder:
        install_library(Path(folder))
        sys.path.insert(0, f"{folder}/site-packages")
        os.chdir(ROOT)
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for name in PLANS:
            for width in (80, 120):
                (GOLDEN / f"{name}_{width}.txt").write_text(printed(name, width), encoding="utf-8")


if __name__ == "__main__":
    renew()
