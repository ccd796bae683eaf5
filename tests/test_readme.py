"""The README and the guide hold: their code runs, their commands run, their table is the rule table's.

Run as a script to renew the table: python tests/test_readme.py.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import rvconvert
from benchmarks import speed
from rvconvert.cli import main as cli
from rvconvert.cli.demo import DigitVAE, kl_divergence, loss_function
from rvconvert.core.registry import Exactness
from rvconvert.files.recipe import import_class
from rvconvert.rules.kinds import Metadata

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDE = sorted((ROOT / "examples" / "guide").glob("*.md"))
PAGES = [README, *GUIDE]
PROSE = [*PAGES, ROOT / ".github" / "CONTRIBUTING.md", ROOT / ".github" / "CHANGELOG.md", ROOT / "examples" / "README.md"]
OPERATIONS = ROOT / "rvconvert" / "rules" / "OPERATIONS.md"
BEGIN, END = "<!-- operations: begin -->\n", "<!-- operations: end -->"
NEEDS = {"import onnxruntime": "onnxruntime", ".onnx": "onnxscript", "for_lightning": "lightning"}
MODEL = """
import torch
from torch import nn


class VAE(nn.Module):
    def __init__(self, latent_dim=8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2 * latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 256), nn.ReLU(), nn.Unflatten(1, (4, 8, 8)))
        self.to_pixels = nn.ConvTranspose2d(4, 3, 8, 8)

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.to_pixels(self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar))), mu, logvar
"""


@pytest.mark.parametrize(("page", "every"), [(README, False), (ROOT / "examples" / "guide" / "speed.md", True)])
def test_the_table_of_speed_is_what_its_command_wrote(page: Path, every: bool) -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text())
    _, begin, rest = page.read_text().partition("<!-- speed: begin -->\n")
    assert begin and rest.partition("\n<!-- speed: end -->")[0] == speed.markdown(rows, every=every)
    assert len({(row["model"], row["dtype"], row["device"], row["memory_kept"]) for row in rows}) == len(rows)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


def label(page: Path) -> str:
    return page.stem


class OtherVAE(DigitVAE):
    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        return DigitVAE.forward(self, x)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode(x)[0]


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    x = torch.rand(8, 1, 8, 8)
    loss_function(x, *model(x)).backward()
    optimizer.step()


def trainer() -> types.SimpleNamespace:
    """As much of a transformers.Trainer as a callback asks for."""
    data = [{"x": torch.rand(8, 1, 8, 8)}]
    added: list[object] = []
    return types.SimpleNamespace(
        model=rvconvert.convert(DigitVAE()), get_train_dataloader=lambda: data, add_callback=added.append, added=added
    )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=label)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, which holds the names that the text takes as given."""
    monkeypatch.chdir(tmp_path)
    for table in ("_modules", "_rules"):  # the rule that a page adds goes with the test
        monkeypatch.setattr(rvconvert.REGISTRY, table, dict(getattr(rvconvert.REGISTRY, table)))
    torch.manual_seed(0)
    vae = DigitVAE()
    torch.save(vae.state_dict(), "vae.pt")
    torch.save({"raw": vae.state_dict(), "ema": {"shadow": vae.state_dict()}}, "both.ckpt")
    names = {
        "F": nn.functional,
        "fresh_vae": DigitVAE(),
        "images": torch.rand(8, 1, 8, 8),
        "kl_divergence": kl_divergence,
        "latent": torch.randn(8, 8),
        "my_library_scale": lambda x: x.detach() * 3,
        "n": 2,
        "other_vae": OtherVAE(),
        "rv_vae": rvconvert.convert(vae),
        "rvconvert": rvconvert,
        "torch": torch,
        "train": train,
        "trainer": trainer(),
        "vae": vae,
    }
    for block in blocks(page, "python"):
        missing = [name for text, name in NEEDS.items() if text in block and not installed(name)]
        if missing or ("for_transformers" in block and not installed("transformers")):
            continue  # the interop environment has them
        exec(compile(block, str(page), "exec"), names)
    if "Scale" in names:
        x = rvconvert.RandomVariable(torch.ones(2), torch.ones(2))
        scaled = rvconvert.convert(nn.Sequential(names["Scale"]()), random_inputs=("input",), output="distribution")(x)
        assert torch.equal(scaled.var, torch.full((2,), 9.0))


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the pages' commands are typed in: a model, its weights in several wrappings, pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vae.py").write_text(MODEL)
    torch.manual_seed(0)
    vae = import_class("models/vae.py:VAE")(latent_dim=128)
    state = vae.state_dict()
    torch.save(state, "vae.pt")
    torch.save({"raw": state, "ema": {"shadow": state}}, "both.ckpt")
    torch.save({"state_dict": state, "hyper_parameters": {"latent_dim": 128}}, "light.ckpt")
    (tmp_path / "photos").mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (80, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path


def commands(page: Path) -> list[list[str]]:
    lines = [line.split(" && ")[-1] for block in blocks(page, "sh") for line in block.splitlines()]
    lines += re.findall(r"`(rvconvert [a-z]+ models/vae\.py[^`]*)`", page.read_text())  # in the text, whole
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("rvconvert") and "..." not in line]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=label)
def test_every_command_runs(page: Path, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in commands(page):
        if arguments[0] == "demo":
            continue  # tests/test_demo.py runs it
        assert cli.main(arguments) == 0, capsys.readouterr().err


def test_the_table_of_commands_is_that_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "examples" / "guide" / "files-and-command-line.md"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = re.findall(r"^    (\w+)", capsys.readouterr().out, flags=re.M)
    assert set(re.findall(r"^\| `rvconvert (\w+)", page.read_text(), flags=re.M)) == set(listed)


@pytest.mark.parametrize("page", PROSE, ids=label)
def test_links_lead_somewhere(page: Path) -> None:
    def headings(of: Path) -> set[str]:
        return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", of.read_text(), flags=re.M)}

    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not heading or heading in headings(there / "README.md" if there.is_dir() else there), target


def test_the_readme_is_short_and_keeps_its_two_commands() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert "\npip install '.[demo]' && rvconvert demo\npip install '.[test]' && pytest\n" in text


def operations_table() -> str:
    """The registry as Markdown: what is promised, under which assumption, and the operations it is promised of."""
    groups: dict[tuple[int, str], list[str]] = defaultdict(list)
    for rule in rvconvert.REGISTRY:
        if isinstance(rule.kind, Metadata) or rule.name.startswith("_"):
            continue  # questions about shapes and dtypes, and torch's own internals
        modules = f" ({', '.join(m.__name__ for m in rule.modules)})" if rule.modules else ""
        groups[list(Exactness).index(rule.exactness), rule.assumption].append(f"{rule.name}{modules}")
    lines = ["| moments | if | operations |", "| --- | --- | --- |"]
    for (order, assumption), names in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        promise = list(Exactness)[order].value.replace("_", " ")
        lines.append(f"| {promise} | {assumption.replace('none', '')} | {', '.join(sorted(names))} |")
    return "\n".join(lines) + "\n"


def test_the_operations_table_is_that_of_the_registry() -> None:
    table = OPERATIONS.read_text().split(BEGIN)[1].split(END)[0]
    assert table == operations_table(), "renew it: python tests/test_readme.py"


if __name__ == "__main__":
    before, rest = OPERATIONS.read_text().split(BEGIN)
    OPERATIONS.write_text(before + BEGIN + operations_table() + END + rest.split(END)[1])
    sys.exit(0)
