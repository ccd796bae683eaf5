"""The README holds: its code runs, its commands parse, its table is the rule table's. Run as a script to renew the table."""

from __future__ import annotations

import re
import shlex
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn

import rvconvert
from rvconvert.cli import main as cli
from rvconvert.cli.demo import DigitVAE, kl_divergence, loss_function
from rvconvert.core.registry import Exactness
from rvconvert.rules.kinds import Metadata

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- operations: begin -->\n", "<!-- operations: end -->"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.S)


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


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, which holds the names that the text takes as given."""
    monkeypatch.chdir(tmp_path)
    for table in ("_modules", "_rules"):  # the rule that the page adds goes with the test
        monkeypatch.setattr(rvconvert.REGISTRY, table, dict(getattr(rvconvert.REGISTRY, table)))
    torch.manual_seed(0)
    names = {
        "F": nn.functional,
        "fresh_vae": DigitVAE(),
        "images": torch.rand(8, 1, 8, 8),
        "kl_divergence": kl_divergence,
        "my_library_scale": lambda x: x.detach() * 3,
        "n": 2,
        "other_vae": OtherVAE(),
        "rvconvert": rvconvert,
        "torch": torch,
        "train": train,
        "vae": DigitVAE(),
    }
    found = blocks("python")
    assert len(found) >= 9
    for block in found:
        exec(compile(block, str(README), "exec"), names)
    x = rvconvert.RandomVariable(torch.ones(2), torch.ones(2))
    scaled = rvconvert.convert(nn.Sequential(names["Scale"]()), random_inputs=("input",), output="distribution")(x)
    assert torch.equal(scaled.var, torch.full((2,), 9.0))


def test_commands_are_those_of_the_command_line() -> None:
    commands = [line.split(" && ")[-1] for block in blocks("sh") for line in block.splitlines()]
    ours = [shlex.split(c)[1:] for c in commands if c.startswith("rvconvert")]
    assert len(ours) >= 4
    for arguments in ours:
        cli._parser().parse_args(arguments)
    assert set(re.findall(r"^\| `rvconvert (\w+)", README.read_text(), flags=re.M)) == {
        "demo",
        "plan",
        "convert",
        "transfer",
        "verify",
        "rules",
    }


def test_links_lead_somewhere() -> None:
    text = README.read_text()
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", text, flags=re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target[1:] in headings if target.startswith("#") else (README.parent / target).exists(), target


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
    table = README.read_text().split(BEGIN)[1].split(END)[0]
    assert table == operations_table(), "renew it: python tests/test_readme.py"


if __name__ == "__main__":
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + operations_table() + END + rest.split(END)[1])
    sys.exit(0)
