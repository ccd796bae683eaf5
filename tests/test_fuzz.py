"""Random decoders against a slow reference and Monte Carlo: the first of those that ``benchmarks.fuzz`` goes on with."""

from __future__ import annotations

import pytest
import torch

from tests.fuzzing.checks import examine
from tests.fuzzing.programs import generate

GRAPHS, EACH = 100, 10


@pytest.mark.parametrize("first", range(0, GRAPHS, EACH))
def test_random_decoders(first):
    for seed in range(first, first + EACH):
        outcome = examine(seed)
        assert not outcome.mismatch, f"python -m benchmarks.fuzz --graphs 1 --seed {seed}\n{outcome.mismatch}"


def test_a_seed_makes_one_program():
    first, second = generate(7), generate(7)
    assert str(first) == str(second)
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_wrong_rule_is_found(monkeypatch):
    """The fuzzer is not blind: a rule of a linear map that forgets to square is reported within some decoders."""
    from rvconvert.rules.kinds import Bilinear

    monkeypatch.setattr(Bilinear, "squared", staticmethod(lambda product, var, weight, like: product(var, weight.abs())))
    assert any("variance" in examine(seed, ("independent",)).mismatch for seed in range(3))
