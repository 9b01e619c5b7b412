"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ckpt_cli.main import cli

ROOT = Path(__file__).parents[2]


def test_the_quickstart_and_the_commands_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "a" / "step_100" / "manifest.json").is_file()

    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^ckpt (.*?) +#", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {line.split()[0] for line in lines} >= {"ls", "show", "verify", "diff", "reshard", "convert", "prune"}
    for line in lines:
        if "s3://" not in line:  # there is no such store
            done_line = CliRunner().invoke(cli, shlex.split(line))
            assert done_line.exit_code == int(line.startswith("diff")), f"{line}: {done_line.output}"


@pytest.mark.parametrize(
    "document", ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / document).parent / target).exists(), f"{document} links to {target}"
