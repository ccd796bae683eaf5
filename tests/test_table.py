"""The table of supported operations is the registry's."""

from rvconvert import REGISTRY
from rvconvert.rules.kinds import Metadata
from rvconvert.rules.table import as_markdown, supported_operations


def test_every_rule_is_in_the_table_once():
    listed = [name for row in supported_operations() for name in row.operations]
    expected = [r.name for r in REGISTRY if not isinstance(r.kind, Metadata) and not r.name.startswith("_")]
    assert sorted(listed) == sorted(expected)


def test_markdown_has_a_row_for_each_group():
    text = as_markdown()
    assert len(text.splitlines()) == 2 + len(supported_operations())
    assert "`conv_transpose2d`" in text and "`ConvTranspose2d`" in text
    assert "linearized" not in text
