"""The demo's picture: the loss of the interrupted run upon that of the uninterrupted one, and how far they are apart.

Knows what became of each attempt, not how it was run.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from ckpt_cli.demo.job import Outcome
from ckpt_cli.output import count_text

_COLOURS = {4: "#1f5fa8", 2: "#d9720f"}
_DEAD = "#c0182b"
_PALE = "#c9ced6"
_GREY = "#6b7280"
_INK = "#202124"
_STYLE: Any = {
    "font.size": 11,
    "axes.edgecolor": _PALE,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def draw(path: Path, attempts: list[Outcome], uninterrupted: dict[int, float], tolerance: float) -> None:
    """Write the picture, a PNG.

    Args:
        path: of the file.
        attempts: the lives of the interrupted run, in order.
        uninterrupted: the loss after each step of the run that nothing happened to.
        tolerance: the largest difference, in nats per byte, at which losses count as equal.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # no window, no display
    from matplotlib import pyplot as plt

    with plt.rc_context(_STYLE):
        figure, (lives, losses, apart) = plt.subplots(
            3, 1, figsize=(11, 7.5), sharex=True, height_ratios=[0.5, 4, 1.1], layout="constrained"
        )
        figure.suptitle("Training through a killed worker and two changes of mesh", x=0.01, ha="left", size=15)
        _draw_lives(lives, attempts)
        _draw_losses(losses, attempts, uninterrupted)
        _draw_difference(apart, attempts, uninterrupted, tolerance)
        apart.set_xlabel("training step")
        apart.set_xlim(0, max(uninterrupted) + 1)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _draw_lives(axes: Any, attempts: list[Outcome]) -> None:
    """A bar for each attempt: when which workers trained."""
    for level, attempt in enumerate(attempts):
        first, last = min(attempt.losses) - 1, max(attempt.losses)
        colour = _COLOURS[attempt.mesh.size]
        axes.barh(-(level % 2), last - first, left=first, height=0.86, color=colour)
        axes.text(
            (first + last) / 2,
            -(level % 2),
            f"{attempt.mesh.size} workers, {attempt.mesh}",
            ha="center",
            va="center_baseline",
            color="white",
            size=10,
            weight="bold",
        )
    axes.set_axis_off()


def _draw_losses(axes: Any, attempts: list[Outcome], uninterrupted: dict[int, float]) -> None:
    axes.plot(
        *_points(uninterrupted), color=_PALE, linewidth=7, solid_capstyle="round", label="uninterrupted run, 4 workers"
    )
    seen: dict[int, float] = {}
    labels = {size: f"interrupted run, on {size} workers" for size in _COLOURS}
    for attempt in attempts:
        start, size = min(attempt.losses) - 1, attempt.mesh.size
        joined = {start: seen[start]} if start in seen else {}  # the line begins where it left off
        axes.plot(*_points(joined | attempt.losses), color=_COLOURS[size], linewidth=1.9, label=labels.pop(size, None))
        seen |= attempt.losses

    steps, low, high = len(uninterrupted), min(uninterrupted.values()), max(uninterrupted.values())
    saved = [save.step for attempt in attempts for save in attempt.saves]
    floor = low - 0.07 * (high - low)
    axes.plot(saved, [floor] * len(saved), linestyle="none", marker="^", markersize=6, color=_GREY, label="checkpoint")

    for before, after in pairwise(attempts):
        start, size = min(after.losses) - 1, after.mesh.size
        axes.axvline(start, color=_COLOURS[size], linewidth=1, linestyle=(0, (4, 3)))
        if before.killed_rank is None:
            height, text = 0.55, f"from step {start},\nonto {size} workers again"
        else:
            killed = max(before.losses)
            axes.axvspan(start, killed, color=_DEAD, alpha=0.10, linewidth=0)
            axes.plot(killed, before.losses[killed], marker="X", markersize=12, color=_DEAD, linestyle="none", zorder=5)
            axes.annotate(
                f"rank {before.killed_rank} killed\nafter step {killed}:\n{count_text(killed - start, 'step')} lost",
                (killed, before.losses[killed]),
                xytext=(killed + 0.03 * steps, low + 0.4 * (high - low)),
                color=_DEAD,
                arrowprops={"arrowstyle": "-", "color": _DEAD, "shrinkB": 7},
            )
            seconds = after.first_step - before.killed
            height, text = (
                0.86,
                f"recovered from step {start}\nonto {size} workers: training\nagain after {seconds:.1f} s",
            )
        axes.text(start + 0.007 * steps, low + height * (high - low), text, color=_COLOURS[size], va="center")
    axes.set_ylim(low - 0.11 * (high - low), high + 0.03 * (high - low))
    axes.set_ylabel("loss, nats per byte")
    axes.grid(axis="y", color=_PALE, linewidth=0.5, alpha=0.6)
    axes.legend(loc="upper right", frameon=False)


def _draw_difference(axes: Any, attempts: list[Outcome], uninterrupted: dict[int, float], tolerance: float) -> None:
    for attempt in attempts:
        apart = {step: abs(loss - uninterrupted[step]) for step, loss in attempt.losses.items()}
        axes.plot(
            *_points(apart),
            color=_COLOURS[attempt.mesh.size],
            linestyle="none",
            marker="o",
            markersize=3.5,
            clip_on=False,
        )
    axes.axhline(tolerance, color=_DEAD, linewidth=1)
    axes.text(0.01 * len(uninterrupted), tolerance, "tolerance", color=_DEAD, va="bottom", size=10)
    axes.set_yscale("symlog", linthresh=1e-7)
    axes.set_ylim(0, tolerance * 6)
    axes.set_ylabel("difference")


def _points(losses: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(losses)
    return steps, [losses[step] for step in steps]
