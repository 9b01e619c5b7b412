"""Compresses a training state that was really trained: how much smaller it gets, and what that costs.

    python -m benchmarks.compression [--quick] [--json FILE]

The demo's GPT is trained on the demo's text for a minute; then its float32 weights and Adam moments, and its weights as
bfloat16, are compressed by each method in turn, in an order drawn anew each time. Speed is in bytes of the state per
second of CPU time of one thread. The state is repeated in memory until no cache holds it; nothing is compressed across
tensors, so that repeating it changes no ratio. README.md in this folder has the rest.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch
import zstandard
from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks import options
from benchmarks.report import Report
from ckpt.storage.compressing import is_compressed
from ckpt_cli.demo.model import GPT
from ckpt_cli.demo.text import Sampler, Text
from ckpt_formats.codecs import TABLE_ROW, decode_block, encode_block, table_row, word_size
from ckpt_formats.digest import BLOCK_SIZE
from ckpt_formats.dtypes import DType, dtype

OURS = "ckpt: exponent-zstd"
_BATCH = 64
_WORKING_SET = 64 << 20
"""Bytes that each measurement goes through, at least."""
_SPEED = 0.9
"""Target in GB per CPU-second."""
_RATIOS = {"float32 training state": 1.18, "bfloat16 weights": 1.5}


@dataclass(frozen=True, slots=True)
class Method:
    """A way to compress blocks: `encode` gives what is stored of one, valid until the next; `decode` makes it again."""

    name: str
    encode: Callable[[memoryview, DType], bytes | memoryview]
    decode: Callable[[bytes, DType, int], bytes | memoryview]


@dataclass(slots=True)
class Measured:
    """One method on one set of tensors; speeds in GB per CPU-second, one per repetition."""

    ratio: float
    encode: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


class _Ours:
    """The codec as it is written and read: small tensors stored as they are, rows of tables made and checked."""

    def __init__(self) -> None:
        self._stored = memoryview(bytearray(BLOCK_SIZE + TABLE_ROW))
        self._decoded = memoryview(bytearray(BLOCK_SIZE))

    def encode(self, data: memoryview, of: DType) -> memoryview:
        if not is_compressed(of, len(data)):
            return data
        length = encode_block(data, word_size(of), self._stored[:-TABLE_ROW])
        self._stored[length : length + TABLE_ROW] = table_row(self._stored[:length])
        return self._stored[: length + TABLE_ROW]

    def decode(self, stored: bytes, of: DType, nbytes: int) -> bytes | memoryview:
        if not is_compressed(of, nbytes):
            return stored
        into = self._decoded[:nbytes]
        decode_block(memoryview(stored)[:-TABLE_ROW], stored[-4:], word_size(of), into)
        return into


def _methods() -> list[Method]:
    ours = _Ours()
    compressor = zstandard.ZstdCompressor(level=1)
    decompressor = zstandard.ZstdDecompressor()

    def planes(data: memoryview, of: DType) -> bytes:
        return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(-1, of.itemsize).T).tobytes()

    def from_planes(data: bytes, of: DType) -> bytes:
        return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(of.itemsize, -1).T).tobytes()

    return [
        Method(OURS, ours.encode, ours.decode),
        Method(
            "zstd -1",
            lambda data, _: compressor.compress(data),
            lambda stored, _, __: decompressor.decompress(stored),
        ),
        Method(
            "zstd -1, all byte planes",
            lambda data, of: compressor.compress(planes(data, of)),
            lambda stored, of, _: from_planes(decompressor.decompress(stored), of),
        ),
    ]


def train(seconds: float) -> tuple[dict[str, list[torch.Tensor]], float, int]:
    """Train the demo's GPT; returns sets of tensors by name, the last loss in nats per byte, and the steps."""
    # threads that wait for each other by spinning get nowhere on a busy machine
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = Text()
    model = GPT(len(text.symbols))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    sampler = Sampler(text, seed=0)
    end = time.monotonic() + seconds
    losses: list[float] = []
    while time.monotonic() < end or len(losses) < 2:
        inputs, targets = sampler.batch(_BATCH, 0, 1)
        optimizer.zero_grad()
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = [parameter.detach() for parameter in model.parameters()]
    slots = [optimizer.state[parameter][slot] for parameter in model.parameters() for slot in ("exp_avg", "exp_avg_sq")]
    sets = {
        "float32 training state": [*weights, *slots],
        "float32 weights": weights,
        "float32 Adam moments": slots,
        "bfloat16 weights": [weight.bfloat16() for weight in weights],
    }
    return sets, statistics.mean(losses[-20:]), len(losses)


def _blocks(tensors: Sequence[torch.Tensor]) -> tuple[list[memoryview], DType]:
    """The blocks of tensors of one dtype, over and over until they are as much as _WORKING_SET."""
    of = dtype(str(tensors[0].dtype).removeprefix("torch."))
    blocks: list[memoryview] = []
    total = 0
    while total < _WORKING_SET:
        for tensor in tensors:
            data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            blocks.extend(data[at : at + BLOCK_SIZE] for at in range(0, len(data), BLOCK_SIZE))
            total += len(data)
    return blocks, of


def _measure(blocks: Sequence[memoryview], of: DType, repetitions: int, order: random.Random) -> dict[str, Measured]:
    methods = _methods()
    total = sum(map(len, blocks))
    measured: dict[str, Measured] = {}
    stored: dict[str, list[bytes]] = {}
    for method in methods:
        # also touches memory and makes contexts before anything is timed
        kept = stored[method.name] = [bytes(method.encode(block, of)) for block in blocks]
        measured[method.name] = Measured(total / sum(map(len, kept)))
        for block, data in zip(blocks, kept, strict=True):
            if method.decode(data, of, len(block)) != block:
                raise AssertionError(f"{method.name} does not give back what it was given")
    for _ in range(repetitions):
        for method in order.sample(methods, len(methods)):
            begin = time.thread_time()
            for block in blocks:
                method.encode(block, of)
            middle = time.thread_time()
            for block, data in zip(blocks, stored[method.name], strict=True):
                method.decode(data, of, len(block))
            end = time.thread_time()
            measured[method.name].encode.append(total / (middle - begin) / 1e9)
            measured[method.name].decode.append(total / (end - middle) / 1e9)
    return measured


def _verdict(value: float, target: float | None) -> str:
    if target is None:
        return ""
    return f" >= {target:g} " + ("[green]met[/]" if value >= target else "[bold red]MISSED[/]")


@click.command()
@click.option("--seconds", default=60.0, show_default=True, help="How long to train.")
@click.option("--repetitions", default=7, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the order in which methods have their turn.")
@click.option("--quick", is_flag=True, help="Only show that it runs: the ratios are of a model that knows nothing yet.")
@options.JSON
def main(seconds: float, repetitions: int, seed: int, quick: bool, json_path: Path | None) -> None:
    """Compress a training state that was really trained."""
    if quick:
        seconds, repetitions = 2.0, 1
    report = Report()
    report.progress(f"training for {seconds:g} s")
    sets, loss, steps = train(seconds)
    report.console.print(f"The demo's GPT after {steps:,} steps, loss {loss:.2f} nats per byte.\n", highlight=False)
    order = random.Random(seed)
    document: dict[str, object] = {"machine": report.facts, "steps": steps, "loss": loss}
    for title, tensors in sets.items():
        report.progress(title)
        nbytes = sum(tensor.nbytes for tensor in tensors)
        blocks, of = _blocks(tensors)
        measured = _measure(blocks, of, repetitions, order)
        table = Table(
            title=f"{title}, {nbytes / 1e6:.1f} MB", title_justify="left", title_style="bold", box=SIMPLE_HEAD
        )
        table.add_column("method")
        for column in ("ratio", "GB per CPU-s, compressing (best)", "decompressing (best)"):
            table.add_column(column, justify="right")
        for name, result in measured.items():
            speed = statistics.median(result.encode)
            ratio_target = _RATIOS.get(title) if name == OURS else None
            speed_target = _SPEED if ratio_target else None
            table.add_row(
                name,
                f"{result.ratio:.3f}{_verdict(result.ratio, ratio_target)}",
                f"{speed:.2f} ({max(result.encode):.2f}){_verdict(speed, speed_target)}",
                f"{statistics.median(result.decode):.2f} ({max(result.decode):.2f})",
            )
        report.console.print(table)
        report.console.print()
        document[title] = {
            name: {"ratio": result.ratio, "encode": result.encode, "decode": result.decode}
            for name, result in measured.items()
        }
    if json_path is not None:
        json_path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
