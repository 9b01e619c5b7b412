"""What the benchmarks can be asked for, in the same words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
Option = Callable[[F], F]

TENSOR_BYTES = 16 << 20
"""Of a large tensor."""
SHAPE = (2048, 2048)
"""The same, of fp32."""

FOLDER: Option[Any] = click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    default=Path(".bench"),
    show_default=True,
    help="Where the files go: it decides which disk is measured.",
)
PROCESSES: Option[Any] = click.option(
    "--processes", type=click.IntRange(1), multiple=True, default=(1, 4), show_default=True
)
SETTLE: Option[Any] = click.option(
    "--settle", type=float, default=0.3, show_default=True, help="Seconds of rest after each sync."
)
SEED: Option[Any] = click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the contents and of the order."
)
JSON: Option[Any] = click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write every time here."
)


def size(default: int) -> Option[Any]:
    """The option --size, in MiB."""
    return click.option(
        "--size", type=click.IntRange(64), default=default, show_default=True, help="MiB, in tensors of 16 MiB."
    )


def repetitions(default: int) -> Option[Any]:
    return click.option("--repetitions", type=click.IntRange(1), default=default, show_default=True)


def only(limit: str = "") -> Option[Any]:
    """The option --only; `limit` is what runs all the same."""
    beside = f", and {limit}" if limit else ""
    return click.option("--only", multiple=True, metavar="SYSTEM", help=f"Run only this system{beside}; repeatable.")


def quick(what: str) -> Option[Any]:
    """The option --quick, which measures `what` instead."""
    return click.option("--quick", is_flag=True, help=f"{what}: to see that it runs, not for figures.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What was asked for."""

    folder: Path
    repetitions: int
    seed: int

    def as_json(self) -> Mapping[str, Any]:
        """All but where the files went."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "folder"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParameters(Parameters):
    """What was asked for where tensors of one size are saved and loaded."""

    tensors: int
    tensor_bytes: int = TENSOR_BYTES
    settle: float = 0.0
    """Seconds of rest after each sync."""
    only: tuple[str, ...] = ()
    """Systems to run beside the raw limit; all when empty."""

    @property
    def nbytes(self) -> int:
        return self.tensors * self.tensor_bytes
