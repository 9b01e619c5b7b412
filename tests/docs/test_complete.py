"""What can be called is documented: every public name, every error, every option of the command."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

import ckpt
from ckpt_cli.main import VERBS, cli

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", [*ckpt.__all__, *ckpt.errors.__all__])
def test_every_public_name_is_in_the_page_of_the_interface(name: str) -> None:
    assert re.search(rf"`(ckpt\.errors\.)?{name}\b", (DOCS / "python.md").read_text())


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_every_option_is_in_the_page_of_the_command(verb: str) -> None:
    context = click.Context(cli)
    command = cli.get_command(context, verb) if verb else cli
    page = (DOCS / ("demo.md" if verb == "demo" else "command.md")).read_text()
    assert command is not None
    assert f"ckpt {verb}" in page
    options = [name for option in command.params for name in option.opts if name.startswith("--")]
    assert [name for name in options if not re.search(rf"{re.escape(name)}(?![\w-])", page)] == []
