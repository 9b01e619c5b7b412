"""What docs/layout.md shows works as it stands there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from ckpt_formats.layout import Layout, Rule
from ckpt_formats.layout.words import from_tree

PAGE = (Path(__file__).parents[2] / "docs/layout.md").read_text()


def test_its_python_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/layout.md", "exec"), {})


@pytest.mark.parametrize("toml", re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL))
def test_its_layouts_are_layouts(toml: str) -> None:
    layout = Layout.parse(toml)
    assert Layout.parse(layout.to_toml()) == layout


def test_what_universal_checkpointing_says_is_said_by_rules() -> None:
    table = PAGE.split("| pattern there | rule here |")[1].split("\n\n")[0]
    rules = [
        from_tree(Rule, tomllib.loads(f"rule = {{{text}}}")["rule"]) for text in re.findall(r"`(match = .*?)`", table)
    ]
    assert len(rules) == 14
    assert all(rule.patterns for rule in rules)
