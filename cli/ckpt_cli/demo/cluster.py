"""Ray on this machine, started in-process with a few simulated nodes, and gone without a trace afterwards.

Knows how to start, question and end nodes; not what their workers do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ckpt_cli.demo.interruption import Interrupted, Interruptions

# Ray reads these as it starts. No statistics leave the machine; no idle worker processes, which would each take seconds
# of two busy cores; and when other programs need the memory, that is no reason to kill ours.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_memory_monitor_refresh_ms": "0",
}
# Every process that descends from the cluster has this variable with the cluster's own value, and is found by it.
_MARK = "CKPT_DEMO_CLUSTER"
_START_LIMIT_S = 120.0
_END_LIMIT_S = 5.0


class ClusterError(Exception):
    """A node of the cluster does not answer, or has died."""


class Cluster:
    """Ray with `nodes` simulated nodes of `workers_per_node` CPUs each. A context manager: it ends all that it started.

    When an error ends it, Ray's own logs are kept in `logs`.
    """

    def __init__(self, nodes: int, workers_per_node: int, logs: Path, interruptions: Interruptions) -> None:
        self.workers_per_node = workers_per_node
        self._count = nodes
        self._logs = logs
        self._interruptions = interruptions
        self._nodes: list[Any] = []
        self._mark = uuid.uuid4().hex
        self._folder = ""

    def __enter__(self) -> Self:
        # Not in the demo's own folder: Ray makes sockets there, whose paths must be short.
        self._folder = tempfile.mkdtemp(prefix="ckpt-demo-ray-")
        try:
            self._start()
            self._interruptions.check()
        except BaseException:
            self.close()
            raise
        return self

    def _start(self) -> None:
        os.environ.update(_ENVIRONMENT, **{_MARK: self._mark})
        import ray

        from ckpt_cli.demo.node import Node

        try:
            ray.init(
                address="local",  # never somebody's running cluster
                num_cpus=self._count * self.workers_per_node,
                num_gpus=0,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=80 * 2**20,
                _node_ip_address="127.0.0.1",
                _temp_dir=self._folder,
            )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            self._keep_logs()
            raise ClusterError(f"Ray did not start: {_last_line(error)}; its logs: {self._logs}") from error
        except SystemExit as error:  # Ray's own answer to SIGTERM, once it has begun to start
            raise Interrupted(signal.SIGTERM) from error
        finally:
            self._interruptions.listen()
        actor = ray.remote(Node).options(num_cpus=self.workers_per_node, max_concurrency=2)
        self._nodes = [actor.remote() for _ in range(self._count)]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._keep_logs()
        self.close()

    def warm_up(self) -> None:
        """Wait until each node has its server process, with torch imported, from which workers are forked."""
        self._ask(self._nodes, "warm_up", limit_s=_START_LIMIT_S)

    def call(self, node: int, method: str, *arguments: Any) -> Any:
        """A reference to the answer that a node will give."""
        return getattr(self._nodes[node], method).remote(*arguments)

    def ask(self, node: int, method: str, *arguments: Any) -> Any:
        """A node's answer."""
        return self._ask([self._nodes[node]], method, *arguments, limit_s=30.0)[0]

    def wait(self, references: list[Any], limit_s: float) -> list[tuple[Any, Any]]:
        """The answers that are there, with their references, once there is one. Empty after `limit_s` seconds.

        Raises ClusterError when a node has died, Interrupted.
        """
        import ray

        deadline = time.monotonic() + limit_s
        ready: list[Any] = []
        while not ready and time.monotonic() < deadline:
            self._interruptions.check()
            ready, _ = ray.wait(references, num_returns=1, timeout=self._interruptions.INTERVAL_S)
        try:
            return [(reference, ray.get(reference)) for reference in ready]
        except ray.exceptions.RayError as error:
            raise ClusterError(f"a node of the cluster died or failed: {_last_line(error)}") from error

    def _ask(self, nodes: list[Any], method: str, *arguments: Any, limit_s: float) -> list[Any]:
        references = [getattr(node, method).remote(*arguments) for node in nodes]
        answers: dict[Any, Any] = {}
        deadline = time.monotonic() + limit_s
        while len(answers) < len(references):
            missing = [reference for reference in references if reference not in answers]
            answers |= self.wait(missing, deadline - time.monotonic())
            if time.monotonic() > deadline:
                raise ClusterError(f"a node of the cluster did not answer '{method}' within {limit_s:.0f} s")
        return [answers[reference] for reference in references]

    def _keep_logs(self) -> None:
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(Path(self._folder, "session_latest", "logs"), self._logs, dirs_exist_ok=True)

    def close(self) -> None:
        """End workers, nodes and Ray, and wait until none of their processes is left. May be called twice."""
        import ray

        for node in self._nodes:
            with contextlib.suppress(ray.exceptions.RayError):  # a node that is gone has taken its workers with it
                ray.kill(node)
        self._nodes = []
        ray.shutdown()
        deadline = time.monotonic() + _END_LIMIT_S
        while processes := _descendants(self._mark):
            if time.monotonic() > deadline:
                for pid in processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.02)
        shutil.rmtree(self._folder, ignore_errors=True)
        os.environ.pop(_MARK, None)


def _descendants(mark: str) -> list[int]:
    """The processes that were started with this mark in their environment, where the system tells (Linux)."""
    sought = f"{_MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has just ended, or is somebody else's
            if sought in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
