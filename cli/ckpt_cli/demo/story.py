"""The demo's story from beginning to end: what happens in which order, what is proved, and what it all took.

Attempts are run by job.py on a cluster from cluster.py; how checkpoints are made and read is the business of `ckpt`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from rich.console import Console

from ckpt_cli.demo.cluster import Cluster
from ckpt_cli.demo.inspection import open_with_safetensors, run_ckpt
from ckpt_cli.demo.interruption import Interruptions
from ckpt_cli.demo.job import Attempt, Job, JobError, Mesh, Outcome
from ckpt_cli.demo.narrator import Narrator
from ckpt_cli.demo.picture import draw
from ckpt_cli.demo.screen import Screen, duration
from ckpt_cli.output import count_text

BATCH = 32
FOUR = Mesh(dp=2, tp=2)
TWO = Mesh(dp=2, tp=1)
# Six ranks that nobody in the story has: a checkpoint can be cut for a cluster that is yet to come.
SIX = Mesh(dp=3, tp=2)
# In nats per byte. Meshes add the same numbers in another order, which shows in a 32-bit float's last digits, and
# training amplifies it.
TOLERANCE = 1e-4
_SHOWN = "model.blocks.0.mlp.up.weight"
_PROMPT = "The "
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Proof:
    """Something that the demo claims, and whether it was so."""

    claim: str
    holds: bool
    detail: str


class Story:
    """Tells the story once.

    Args:
        console: where it is told.
        out: an empty folder that takes all that is written.
        steps: to train for, at least 24.
        interruptions: by which it may be cut short.
    """

    def __init__(self, console: Console, out: Path, steps: int, interruptions: Interruptions) -> None:
        self._screen = Screen(console)
        self._interruptions = interruptions
        self._cluster = Cluster(2, 2, out / "logs" / "ray", interruptions)
        self._job = Job(self._cluster, out, steps=steps, batch=BATCH)
        self._out = out
        self._steps = steps
        self._save_every = steps // 12
        self._kill_at = self._save_every * 4 + (self._save_every + 1) // 2
        self._grow_at = self._save_every * 7
        self._recovered_from = out
        self._proofs: list[Proof] = []
        self._took: list[tuple[str, float]] = []
        self._facts: dict[str, Any] = {"out": str(out), "steps": steps, "commands": []}

    def tell(self) -> dict[str, Any]:
        """Tell it. Returns the facts; `ok` says whether all that was to be proved held.

        Raises JobError or ClusterError when it could not be carried out, Interrupted when it was cut short.
        """
        screen = self._screen
        screen.title(
            "ckpt demo: train, save, lose a worker, recover on another mesh, reshard",
            f"What it writes lies in {self._out}. Ctrl-C ends it and leaves no process behind.",
        )
        with screen:
            screen.heading("Getting ready")
            screen.waiting_for("starting Ray")
            with self._cluster:
                self._note("Ray started", screen.seconds)
                screen.say("Ray is up: 2 nodes of 2 CPUs, simulated on this machine")
                screen.waiting_for("importing torch, once per node")
                self._timed("torch imported, once per node", self._cluster.warm_up)
                screen.say("each node has imported torch once; its workers are forked from that process")
                lives = self._live()
                uninterrupted = self._uninterrupted(lives)
                self._resumed(uninterrupted)
                last, resharded = self._newest(), self._out / "resharded"
                self._hand_over(last, resharded)
                self._write(resharded)
            screen.heading("What came of it")
            screen.waiting_for("drawing the picture")
            picture = self._out / "loss.png"
            self._timed("picture drawn", lambda: draw(picture, lives, uninterrupted.losses, TOLERANCE))
        return self._conclude(picture)

    # --- the interrupted run ---

    def _live(self) -> list[Outcome]:
        """The run's three lives: four workers until one is killed, then two, then four again."""
        screen = self._screen
        screen.heading(f"1  Four workers train a small GPT, and save every {self._save_every} steps")
        first = self._run("1-four-workers", FOUR, None, self._steps, saves=True, kill_at=self._kill_at)

        screen.heading("2  Recovering onto two workers")
        screen.say(f"noticed after {duration(first.noticed - first.killed)}")
        stopped = duration(first.aborted - first.noticed)
        screen.say(f"the other 3 workers, which wait for it in a collective, are stopped {stopped} later")
        newest, reached = self._newest(), max(first.losses)
        self._recovered_from = newest
        lost = reached - _step(newest)
        screen.say(f"{newest.name} is the newest committed checkpoint: {count_text(lost, 'step')} to be done again")
        second = self._run("2-two-workers", TWO, newest, self._grow_at, saves=True, since=("the kill", first.killed))
        self._facts["kill"] = {
            "rank": first.killed_rank,
            "after_step": reached,
            "noticed_s": first.noticed - first.killed,
            "others_stopped_s": first.aborted - first.noticed,
            "recovered_from_step": _step(newest),
            "steps_lost": lost,
        }
        self._note("death noticed", first.noticed - first.killed)
        self._note("the other 3 workers stopped", first.aborted - first.noticed)
        self._note_start("2", second)
        self._note("  from the kill to training again", second.first_step - first.killed)

        screen.heading("3  The lost node is back: four workers again")
        third = self._run(
            "3-four-workers", FOUR, self._newest(), self._steps, saves=True, since=("two workers ended", second.ended)
        )
        self._note_start("4", third)
        lives = [first, second, third]
        saves = [save for life in lives for save in life.saves]
        self._note(f"a save ({len(saves)} of them, median)", median(save.seconds for save in saves))
        self._facts["lives"] = [_life(life) for life in lives]
        return lives

    # --- what is proved of it ---

    def _uninterrupted(self, lives: list[Outcome]) -> Outcome:
        self._screen.heading("4  The same training once more, and nothing happens to it")
        run = self._run("4-uninterrupted", FOUR, None, self._steps)
        apart = {step: abs(loss - run.losses[step]) for life in lives for step, loss in life.losses.items()}
        largest = max(apart.values())
        self._prove(
            "losses after recovery are those of an uninterrupted run",
            largest <= TOLERANCE and set(apart) == set(run.losses),
            f"at most {largest:.1e} apart in {len(apart)} steps (tolerance {TOLERANCE:.0e})",
        )
        drawn = [life.samples for life in lives[1:]]
        expected = [BATCH * (min(life.losses) - 1) for life in lives[1:]]
        self._prove(
            "the order of the data is kept",
            drawn == expected,
            f"went on with samples {' and '.join(f'{sample:,}' for sample in drawn)}",
        )
        self._facts["uninterrupted"] = _life(run)
        self._facts["largest_difference"] = largest
        self._facts["tolerance"] = TOLERANCE
        return run

    def _resumed(self, uninterrupted: Outcome) -> None:
        checkpoint = self._recovered_from
        self._screen.heading(f"5  Resumed from {checkpoint.name} on the mesh that wrote it")
        run = self._run("5-same-mesh", FOUR, checkpoint, _step(checkpoint) + self._save_every)
        equal = sum(loss == uninterrupted.losses[step] for step, loss in run.losses.items())
        self._prove(
            "resumed on the same mesh, the losses are equal bit for bit",
            equal == len(run.losses) > 0,
            f"in {equal} of {len(run.losses)} steps",
        )
        self._facts["same_mesh"] = {"steps": len(run.losses), "bit_equal": equal}

    # --- the last checkpoint ---

    def _hand_over(self, last: Path, resharded: Path) -> None:
        """Reshard the last checkpoint and verify it with the command, and look into a file with safetensors."""
        screen = self._screen
        screen.heading("6  The last checkpoint in other hands")
        self._command(
            "ckpt reshard cut it for 6 ranks",
            "reshard",
            last,
            resharded,
            "--mesh",
            f"dp={SIX.dp},tp={SIX.tp}",
        )
        self._command("ckpt verify found every byte as written", "verify", resharded)
        self._command("ckpt diff found the original's values", "diff", last, resharded)
        opened = open_with_safetensors(resharded, _SHOWN)
        shape = " x ".join(map(str, opened.shape))
        screen.say(
            f"{opened.file.relative_to(self._out)} in plain safetensors: {len(opened.names)} tensors, among them"
        )
        screen.quote(f"{opened.name}  {opened.dtype}  {shape}")
        self._facts["safetensors"] = {
            "file": str(opened.file),
            "tensors": len(opened.names),
            "name": opened.name,
            "shape": opened.shape,
        }

    def _command(self, claim: str, *arguments: str | Path) -> None:
        self._screen.waiting_for(f"ckpt {arguments[0]}")
        ran = run_ckpt(self._interruptions, *arguments)
        self._screen.say(f"$ {ran.line}", "bold")
        self._screen.quote(ran.output)
        self._proofs.append(Proof(claim, ran.code == 0, f"exit code {ran.code}"))
        self._note(f"ckpt {arguments[0]}", ran.seconds)
        self._facts["commands"].append({"line": ran.line, "seconds": ran.seconds, "code": ran.code})
        if ran.code == 2 or ran.code < 0:  # not an answer that is no, but no answer
            raise JobError(f"'{ran.line}' ended with exit code {ran.code}; what it said is above")

    def _write(self, checkpoint: Path) -> None:
        self._screen.waiting_for("one process loads the model and writes")
        attempt = Attempt(name="6-writing", mesh=Mesh(1, 1), checkpoint=checkpoint, stop=0, prompt=_PROMPT)
        outcome = self._job.run(attempt, lambda *_: None)
        self._screen.say(f"the model, loaded whole into one process in {duration(outcome.load_seconds)}, writes:")
        self._screen.quote(outcome.text, "italic")
        self._facts["text"] = outcome.text

    # --- the end ---

    def _conclude(self, picture: Path) -> dict[str, Any]:
        screen = self._screen
        screen.claims([(proof.holds, proof.claim, proof.detail) for proof in self._proofs])
        screen.heading("What each step took")
        self._note("all of it", screen.seconds)
        screen.table([(what, duration(seconds)) for what, seconds in self._took])
        screen.heading(f"The picture: {picture}")
        self._facts |= {
            "ok": all(proof.holds for proof in self._proofs),
            "picture": str(picture),
            "proofs": [asdict(proof) for proof in self._proofs],
            "seconds": dict(self._took),
        }
        return self._facts

    # --- the tools ---

    def _run(
        self,
        name: str,
        mesh: Mesh,
        checkpoint: Path | None,
        stop: int,
        *,
        saves: bool = False,
        kill_at: int | None = None,
        since: tuple[str, float] | None = None,
    ) -> Outcome:
        every = self._save_every if saves else 0
        attempt = Attempt(name=name, mesh=mesh, checkpoint=checkpoint, stop=stop, save_every=every, kill_at=kill_at)
        tell = Narrator(self._screen, attempt, steps=self._steps, every=self._save_every * 3, since=since)
        self._screen.waiting_for("forking workers")
        return self._job.run(attempt, tell)

    def _newest(self) -> Path:
        """The run's newest committed checkpoint: the root that is published last makes it one."""
        roots = sorted(self._job.run_folder.glob("step_*/manifest.json"))
        if not roots:
            raise JobError(f"no checkpoint was committed in {self._job.run_folder}")
        return roots[-1].parent

    def _prove(self, claim: str, holds: bool, detail: str) -> None:
        self._proofs.append(Proof(claim, holds, detail))
        self._screen.say(f"{claim}: {detail}", "green" if holds else "bold red")

    def _note(self, what: str, seconds: float) -> None:
        self._took.append((what, seconds))

    def _note_start(self, workers: str, outcome: Outcome) -> None:
        self._note(f"{workers} workers forked", outcome.up - outcome.began)
        self._note("  process groups and model", outcome.ready - outcome.up)
        self._note("  checkpoint loaded", outcome.load_seconds)
        self._note("  first step", outcome.first_step - outcome.loaded)

    def _timed(self, what: str, function: Callable[[], _T]) -> _T:
        began = self._screen.seconds
        answer = function()
        self._note(what, self._screen.seconds - began)
        return answer


def _step(checkpoint: Path) -> int:
    """The training step that a checkpoint is of, as its folder's name says."""
    return int(checkpoint.name.removeprefix("step_"))


def _life(outcome: Outcome) -> dict[str, Any]:
    """The facts of an attempt, for JSON."""
    return {
        "mesh": {"dp": outcome.mesh.dp, "tp": outcome.mesh.tp},
        "workers": outcome.mesh.size,
        "threads_per_worker": outcome.threads,
        "rows": [outcome.rows[rank] for rank in sorted(outcome.rows)],
        "samples_before": outcome.samples,
        "losses": {str(step): loss for step, loss in sorted(outcome.losses.items())},
        "saved_steps": [save.step for save in outcome.saves],
        "step_s": median(outcome.step_seconds),
        "save_s": median(save.seconds for save in outcome.saves) if outcome.saves else None,
        "load_s": outcome.load_seconds,
    }
