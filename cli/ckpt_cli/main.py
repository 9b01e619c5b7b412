"""The `ckpt` command: finds the verb, runs it, and turns errors into one sentence and an exit code.

Each verb is a module of its own, imported when it is called, so that `ckpt --help` is quick and no verb pays for what
another one needs.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any, NamedTuple

import click

__all__ = ["cli", "main"]


class _Verb(NamedTuple):
    module: str
    summary: str


VERBS = {
    "demo": _Verb("ckpt_cli.demo.command", "Train, save, kill, recover, reshard: the whole story, on this machine."),
    "ls": _Verb("ckpt_cli.ls", "List the checkpoints of a run."),
    "show": _Verb("ckpt_cli.show", "Show what is in a checkpoint, how it is cut, and what made it."),
    "verify": _Verb("ckpt_cli.verify", "Check every byte of a checkpoint against its checksum."),
    "diff": _Verb("ckpt_cli.diff", "Tell what differs between two checkpoints."),
    "reshard": _Verb("ckpt_cli.reshard", "Write a checkpoint anew, cut for another mesh."),
    "convert": _Verb(
        "ckpt_cli.convert", "Write a checkpoint, or a part, in another dtype, format, or with other names."
    ),
    "copy": _Verb("ckpt_cli.copy", "Copy a checkpoint or a run, every byte verified."),
    "prune": _Verb("ckpt_cli.prune", "Remove old checkpoints of a run by a rule, and debris."),
    "tag": _Verb("ckpt_cli.tag", "Give a checkpoint names, pin it, record metrics beside it."),
}


class _NoError(click.ClickException):
    """The request was right, but what it asks for is damaged or could not be done."""

    exit_code = 1


class _WrongError(click.ClickException):
    """The request is wrong."""

    exit_code = 2


class _Verbs(click.Group):
    """The verbs, each found in its module when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's
        verb = VERBS.get(cmd_name)
        if verb is None:
            return None
        command: click.Command = getattr(importlib.import_module(verb.module), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.summary) for name, verb in VERBS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        # a name in another encoding than the terminal's is printed with escapes, not refused
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise  # click's own, and a reader such as `head` that has seen enough
        except (KeyboardInterrupt, click.Abort):
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo("Interrupted.", err=True)
            raise click.exceptions.Exit(130) from None
        except Exception as error:  # noqa: BLE001 - whatever it is, a user sees a sentence
            if ctx.params.get("debug"):
                traceback.print_exc()
            raise _explained(error) from None


def _explained(error: Exception) -> click.ClickException:
    """The sentence and exit code for an error."""
    from ckpt_cli.output import plain
    from ckpt_formats import errors

    if isinstance(error, errors.CheckpointError):
        message = plain(error.message, lines=True)
        # what this release does not know is no fault of the checkpoint's
        unknown = (errors.UnknownVersionError, errors.UnknownCodecError, errors.UnknownDtypeError)
        failed = (errors.CorruptionError, errors.FormatError, errors.SaveFailedError)
        if isinstance(error, failed) and not isinstance(error, unknown):
            return _NoError(message)
        return _WrongError(message)
    if isinstance(error, RecursionError):
        return _NoError("values in the checkpoint are nested too deeply to be read; it was written wrongly")
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return _WrongError(plain(f"{place}{error.strerror}"))
    message = f"{type(error).__name__}: {error}. This is a bug in ckpt; `ckpt --debug` before the verb shows where"
    return _WrongError(plain(message))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="anyckpt", prog_name="ckpt", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Training checkpoints: look into them, check them, compare them, cut them anew, keep them.

    Exit codes: 0 done; 1 the answer is no (damaged, differs); 2 the request is wrong. `ckpt VERB --help` says what they
    mean for each verb.
    """
    del debug  # read from the context where errors are handled


def main() -> None:
    """The entry point of the command."""
    cli(prog_name="ckpt")
