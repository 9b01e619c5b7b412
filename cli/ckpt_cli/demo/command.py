"""`ckpt demo`: the whole story on this machine. Parses, checks what is installed, tells the story, prints the facts."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import click

from ckpt_cli.demo.interruption import Interrupted, Interruptions
from ckpt_cli.output import json_option, print_json

_NEEDED = ("ray", "matplotlib", "safetensors")
_FEWEST_STEPS = 24


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for checkpoints, logs and the picture; made new.  [default: demo_out/ and the time]",
)
@click.option(
    "--steps",
    type=click.IntRange(min=_FEWEST_STEPS),
    default=96,
    show_default=True,
    help="Steps to train for; fewer are done sooner.",
)
@json_option
def demo(out: Path | None, steps: int, as_json: bool) -> None:
    """Train, save, lose a worker, recover, reshard: the whole story, on this machine.

    Four workers on Ray train a small GPT by FSDP2 and tensor parallelism. One is killed; training goes on with two on
    another mesh, then with four again. The losses are compared with those of a run that nothing happened to, and the
    last checkpoint is resharded, verified and read. One to two minutes on two cores; Ctrl-C ends it and leaves no
    process behind.

    With --json, the story goes to stderr and the facts to stdout.

    Exit codes: 0 all held true; 1 something did not, or failed; 2 the request is wrong; 130 interrupted.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise click.UsageError(f"the demo needs {' and '.join(missing)}: pip install 'anyckpt[demo]'")
    out = out or Path("demo_out", time.strftime("%Y%m%d-%H%M%S"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = any(out.iterdir())
    except OSError as error:
        raise click.UsageError(f"{out} can't be used: {error.strerror}; name another folder with --out") from error
    if taken:
        raise click.UsageError(f"{out} is not empty; name another folder with --out")

    from rich.console import Console

    from ckpt_cli.demo.cluster import ClusterError
    from ckpt_cli.demo.job import JobError
    from ckpt_cli.demo.story import Story

    console = Console(stderr=as_json, highlight=False)
    if not console.is_terminal:
        console.width = 140  # no line of a table is to be broken for a width that nobody has set
    try:
        with Interruptions() as interruptions:
            facts = Story(console, out, steps, interruptions).tell()
    except (ClusterError, JobError) as error:
        raise click.ClickException(str(error)) from error
    except Interrupted as interrupted:
        console.print(f"Stopped; no process is left behind. What was written lies in {out}.")
        raise SystemExit(interrupted.exit_code) from None
    if as_json:
        print_json(facts)
    raise SystemExit(0 if facts["ok"] else 1)
