"""What ``plan`` prints is held to a file; run this file to renew it: python -m tests.test_plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rvconvert
from rvconvert.render import report_table, to_text
from tests.models import VanillaVAE

GOLDEN = Path(__file__).parent / "golden" / "plan.txt"


def printed() -> str:
    """The plan of a VAE as a person sees it from the project's folder."""
    report = rvconvert.plan(VanillaVAE(), example_inputs=torch.rand(4, 3, 16, 16))
    lines = to_text(report_table(report), width=150).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def test_plan_prints_as_in_the_golden_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert printed() == GOLDEN.read_text(encoding="utf-8")


def test_a_converted_model_exports_and_compiles_whole() -> None:
    x = torch.rand(4, 3, 16, 16)
    rv = rvconvert.convert(VanillaVAE().eval(), example_inputs=x)
    expected = rv(x)[0]
    exported = torch.export.export(rv, (x,)).module()
    torch.testing.assert_close(exported(x)[0], expected)
    compiled = torch.compile(rv, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], expected)


if __name__ == "__main__":
    GOLDEN.write_text(printed(), encoding="utf-8")
