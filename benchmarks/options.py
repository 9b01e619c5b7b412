"""What the benchmarks that save tensors in an interleaved run can be asked for, in the same words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What was asked for."""

    tensors: int
    tensor_bytes: int
    folder: Path
    repetitions: int
    settle: float
    """Seconds of rest after each sync."""
    seed: int
    only: tuple[str, ...]
    """Systems to run beside the raw limit; all when empty."""

    @property
    def nbytes(self) -> int:
        return self.tensors * self.tensor_bytes

    def as_json(self, processes: Sequence[int]) -> Mapping[str, Any]:
        """For write_json."""
        return {
            "processes": list(processes),
            "bytes": self.nbytes,
            "tensor_bytes": self.tensor_bytes,
            "repetitions": self.repetitions,
            "settle_s": self.settle,
            "seed": self.seed,
        }


def run_options(*, repetitions: int, only: str, quick: str) -> Callable[[F], F]:
    """The options behind those that say what is saved and where; `only` and `quick` are their help."""
    options = [
        click.option("--repetitions", type=click.IntRange(1), default=repetitions, show_default=True),
        click.option("--settle", type=float, default=0.3, show_default=True, help="Seconds of rest after each sync."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the contents and of the order."),
        click.option("--only", multiple=True, metavar="SYSTEM", help=only),
        click.option("--quick", is_flag=True, help=quick),
        click.option(
            "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write every time here."
        ),
    ]

    def add(command: F) -> F:
        # decorators stand above each other: the last one applied is the first one shown
        for option in reversed(options):
            command = option(command)
        return command

    return add
