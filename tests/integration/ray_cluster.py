"""A real Ray cluster of two nodes: two raylets on this machine, one CPU each."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.paths import ROOT

OBJECT_STORE_BYTES = 200 << 20
"""Of a node; Ray would take a third of the memory."""
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port")
"""A raylet that does not know the ports of its agents ends if an agent takes longer than 15 s to start, which is not a
setting; on a busy machine that happens."""


def node_options() -> dict[str, Any]:
    """Return the options of a node: one CPU, and all ports for which its raylet would wait."""
    return {
        "num_cpus": 1,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_log_monitor": False,
        **{name: free_port() for name in AGENT_PORTS},
    }


def free_port() -> int:
    """Return a port of loopback on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def without_waiting(start_raylet: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of Ray's `Node` that starts a raylet which waits for no agent: one port cannot be given."""

    def start(node: Any, *args: Any, **options: Any) -> Any:
        raylet = import_module("ray._raylet")  # compiled, without types
        raylet.persist_port(
            node.get_session_dir_path(),
            node.node_id,
            raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME,
            -1,  # none
        )
        return start_raylet(node, *args, **options)

    return start


class TwoNodes:
    """A cluster with a head and a second node, which can be killed."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.node: Any = None

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add_node(self) -> None:
        """Add the second node."""
        self.node = self.cluster.add_node(**node_options())

    def workers(self, title: str = "") -> list[int]:
        """Return the processes of the second node whose title begins with a text."""
        found = []
        for process in self._children():
            line = Path(f"/proc/{process}/cmdline").read_bytes()
            if line.startswith(title.encode()):
                found.append(process)
        return found

    def kill_node(self) -> None:
        """Kill the second node with all its processes, without a warning."""
        for process in (self._raylet, *self._children()):
            os.kill(process, signal.SIGKILL)
        self.cluster.remove_node(self.node, allow_graceful=False)

    @property
    def _raylet(self) -> int:
        return int(self.node.all_processes["raylet"][0].process.pid)

    def _children(self) -> list[int]:
        raylet = self._raylet
        children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text(encoding="utf-8")
        return [int(process) for process in children.split()]


@contextmanager
def two_nodes(folders: pytest.TempPathFactory, **environment: str) -> Iterator[TwoNodes]:
    """Start a cluster of two nodes. Parallel test processes have one after the other.

    Args:
        folders: of the test run.
        environment: variables of the nodes and their workers. Those of this process that begin with IDDPM_ are unset.
    """
    from ray._private.node import Node
    from ray.cluster_utils import Cluster

    own = folders.getbasetemp()
    run = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with FileLock(run / "ray.lock"), pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("IDDPM_") and name != "IDDPM_TEST_LONG"]:
            patch.delenv(name)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
        patch.setenv("RAY_worker_niceness", "0")  # by default, workers wait for all else that a busy machine does
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr("ray._private.node.Node.start_raylet", without_waiting(Node.start_raylet))
        head = {**node_options(), "include_dashboard": False, "no_monitor": True}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes = TwoNodes(cluster)
            nodes.add_node()
            yield nodes
        finally:
            cluster.shutdown()
