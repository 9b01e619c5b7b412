"""Tells of one attempt, event by event: which of them deserve a line, and in which words."""

from __future__ import annotations

from ckpt_cli.demo.job import Attempt, Outcome
from ckpt_cli.demo.protocol import Event
from ckpt_cli.demo.screen import Screen, duration
from ckpt_cli.output import size_text


class Narrator:
    """Is called with each event of an attempt.

    Args:
        screen: where it is told.
        attempt: which one.
        steps: of the whole training.
        every: after how many steps to say how the loss is, where nothing is saved.
        since: what happened, and when (`time.monotonic`, seconds), that the attempt recovers from.
    """

    def __init__(
        self, screen: Screen, attempt: Attempt, *, steps: int, every: int, since: tuple[str, float] | None = None
    ) -> None:
        self._screen = screen
        self._attempt = attempt
        self._steps = steps
        self._every = every
        self._since = since
        self._count: dict[str, int] = {}

    def __call__(self, event: Event, outcome: Outcome) -> None:
        self._count[event.kind] = self._count.get(event.kind, 0) + 1
        by_all = self._count[event.kind] == self._attempt.mesh.size
        match event.kind:
            case "up" if by_all:
                self._up(outcome)
            case "ready" if by_all:
                self._ready(outcome)
            case "loaded" if by_all:
                self._loaded(outcome)
            case "step":
                self._step(event, outcome)
            case "saved":
                self._saved(event, outcome)
            case "killed":
                step = max(outcome.losses)
                self._screen.say(
                    f"SIGKILL to rank {event.rank} (process {event.facts['pid']}), in the middle of step {step + 1}",
                    "bold red",
                )
            case _:
                pass

    def _up(self, outcome: Outcome) -> None:
        size = self._attempt.mesh.size
        if self._attempt.prompt:
            return
        self._screen.say(f"{size} workers forked in {duration(outcome.up - outcome.began)}, mesh {outcome.mesh}")
        self._screen.waiting_for("joining the process groups, building the model")

    def _ready(self, outcome: Outcome) -> None:
        if self._attempt.save_every and self._attempt.checkpoint is None:
            self._screen.say(
                f"a GPT of {outcome.parameters:,} parameters, on the text of Python's help(): "
                f"{outcome.symbols} different bytes"
            )
        rows = [outcome.rows[rank] for rank in sorted(outcome.rows)]
        self._screen.say(
            f"process groups and model in {duration(outcome.ready - outcome.up)}; the {sum(rows)} rows of one weight "
            f"lie as {' + '.join(map(str, rows))}"
        )
        self._screen.waiting_for("loading the checkpoint" if self._attempt.checkpoint else "the first step")

    def _loaded(self, outcome: Outcome) -> None:
        if self._attempt.checkpoint is None or self._attempt.prompt:
            return
        self._screen.say(
            f"{self._attempt.checkpoint.name} loaded in {duration(outcome.load_seconds)}; "
            f"the next sample is number {outcome.samples:,}"
        )
        self._screen.waiting_for("the first step")

    def _step(self, event: Event, outcome: Outcome) -> None:
        step, loss = event.facts["step"], event.facts["loss"]
        if len(outcome.losses) == 1:
            if self._since is not None:
                what, when = self._since
                self._screen.say(f"training again {duration(event.at - when)} after {what}", "bold green")
            elif step == 1:
                self._screen.say(f"step   1  loss {loss:.3f}")
        self._screen.at_step(step, self._steps, f"loss {loss:.3f}  {outcome.mesh}")
        if not self._attempt.save_every and step % self._every == 0:
            self._screen.say(f"step {step:>3}  loss {loss:.3f}")

    def _saved(self, event: Event, outcome: Outcome) -> None:
        step = event.facts["step"]
        size, seconds = size_text(event.facts["bytes"]), duration(event.facts["seconds"])
        self._screen.say(f"step {step:>3}  loss {outcome.losses[step]:.3f}  saved: {size} in {seconds}")
