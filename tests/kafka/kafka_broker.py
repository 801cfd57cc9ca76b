"""A real Apache Kafka on this machine: one node, or three for the tests of failures.

Each node is broker and controller in one process (KRaft), bound to 127.0.0.1 or to another
address of this machine. All that a cluster is lies in one folder: its id, address and ports,
and for each node settings, log, data, and who runs it. So a cluster that was started here can
be found, ended, or started again from any process.
"""

import fcntl
import json
import os
import random
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from kafka_jars import BROKER, jars
from kafka_java import java

from streamd.errors import Busy, StreamdError, TimedOut
from streamd.instance import Identity

LABEL = "Apache Kafka 4.3.1"
# C1 alone: ready after 1.4 s instead of 2.0 with less CPU; a long bench wants both compilers.
QUICK = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
STEADY = ("-Xmx1g", "-XX:+UseSerialGC")
# Below what the kernel gives to outgoing connections: a node that comes back finds its port.
PORTS = range(20_000, 30_000)
LOOPBACK = "127.0.0.1"
TRIES = 3


class Node:
    """One node of a cluster."""

    def __init__(
        self, folder: Path, number: int, host: str, port: int, controller_port: int
    ) -> None:
        self.folder = folder
        self.number = number
        self.host = host
        self.port = port
        self.controller_port = controller_port
        self.address = f"{host}:{port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def identity(self) -> Identity | None:
        """Who runs it, or ran it last; None before its first start."""
        try:
            return msgspec.json.decode(
                (self.folder / "process.json").read_bytes(), type=Identity
            )
        except FileNotFoundError:
            return None

    def is_alive(self) -> bool:
        """True while its process exists, also before it answers."""
        if self._process is not None and self._process.poll() is None:
            return True
        identity = self.identity
        return identity is not None and identity.is_alive()

    def start(self, *, flags: Sequence[str] = QUICK, parent: int = 0) -> None:
        """Start its process on the data it has; returns at once, does nothing where it runs.

        Args:
            parent: The process whose end ends the node too; 0 for none.
        """
        if self.is_alive():
            return
        (self.folder / "process.json").unlink(missing_ok=True)
        class_path = os.pathsep.join(map(str, jars(BROKER, label=LABEL)))
        script = Path(__file__).with_name("kafka_node.py")
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", script, self.folder, java(), class_path,
                 str(parent), *flags],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """End its process at once, as a crash does, and wait until it is gone."""
        self._end(signal.SIGKILL, 30)

    def stop(self, *, deadline_s: float = 60) -> None:
        """Let it hand over its partitions and end.

        Raises:
            TimedOut: It has not ended after `deadline_s`; it goes on ending.
        """
        self._end(signal.SIGTERM, deadline_s)

    def pause(self) -> None:
        """Stop its process as it is: connections stay open, nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        self._signal(signal.SIGCONT)

    def last_lines(self, count: int = 8) -> list[str]:
        """The end of its log."""
        try:
            return (self.folder / "log").read_text(errors="replace").splitlines()[-count:]
        except FileNotFoundError:
            return []

    def _signal(self, number: signal.Signals) -> None:
        identity = self.identity
        if identity is not None and identity.is_alive():
            os.kill(identity.pid, number)
        elif self._process is not None and self._process.poll() is None:
            # It has not yet written who it is.
            self._process.send_signal(number)

    def _end(self, number: signal.Signals, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        self._signal(number)
        while self.is_alive():
            if time.monotonic() > deadline:
                raise TimedOut(f"node {self.number} has not ended after {deadline_s:.0f} s")
            time.sleep(0.01)


class Cluster:
    """All nodes of a broker whose state lies in `folder`."""

    def __init__(self, folder: Path, cluster_id: str, nodes: list[Node]) -> None:
        self.folder = folder
        self.cluster_id = cluster_id
        self.nodes = nodes
        self.bootstrap = ",".join(node.address for node in nodes)  # librdkafka's form
        self.url = "kafka://" + ";".join(node.address for node in nodes)  # streamd's form

    @classmethod
    def make(
        cls,
        folder: Path,
        *,
        nodes: int = 1,
        host: str = LOOPBACK,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        listeners: Mapping[str, int] | None = None,
    ) -> "Cluster":
        """Write the settings of a new cluster; nothing is started.

        Args:
            nodes: How many; replication is as high as three.
            host: The address that it listens on.
            port: Of the first node, the next ones follow; None for free ones.
            settings: Kafka's own, over those of `_properties`.
            listeners: Further ones of a single node, with their ports; `settings` has what
                they speak.

        Raises:
            Busy: A port that was asked for is taken.
        """
        ports = free_ports(2 * nodes, port, nodes)
        folder.mkdir(mode=0o700, parents=True)
        cluster_id = urlsafe_b64encode(secrets.token_bytes(16)).rstrip(b"=").decode()
        # The tool takes an id that begins with a dash for an option.
        cluster_id = "s" + cluster_id[1:]
        made = cls(
            folder,
            cluster_id,
            [
                Node(folder / f"node-{n + 1}", n + 1, host, ports[n], ports[nodes + n])
                for n in range(nodes)
            ],
        )
        (folder / "id").write_text(cluster_id)
        (folder / "host").write_text(host)
        for node in made.nodes:
            node.folder.mkdir()
            lines = made._properties(node) | dict(settings or {})
            for name, extra in (listeners or {}).items():
                lines["listeners"] += f",{name}://127.0.0.1:{extra}"
                lines["advertised.listeners"] += f",{name}://localhost:{extra}"
            (node.folder / "server.properties").write_text(
                "".join(f"{name}={value}\n" for name, value in lines.items())
            )
        # Last: a folder without it is one whose making was interrupted.
        (folder / "ports.json").write_text(json.dumps(ports))
        return made

    @classmethod
    def find(cls, folder: Path) -> "Cluster | None":
        """The cluster that was made in `folder`, running or not."""
        try:
            ports = json.loads((folder / "ports.json").read_text())
            cluster_id = (folder / "id").read_text()
            host = (folder / "host").read_text()
        except FileNotFoundError:
            return None
        nodes = len(ports) // 2
        return cls(
            folder,
            cluster_id,
            [
                Node(folder / f"node-{n + 1}", n + 1, host, ports[n], ports[nodes + n])
                for n in range(nodes)
            ],
        )

    def start(
        self, *, flags: Sequence[str] = QUICK, parent: int = 0, deadline_s: float = 120
    ) -> None:
        """Start the nodes that do not run, and wait until all answer.

        Raises:
            StreamdError: A node ended, or does not answer in time; all are ended then.
        """
        try:
            for node in self.nodes:
                node.start(flags=flags, parent=parent)
            self.wait_ready(deadline_s=deadline_s)
        except BaseException:
            self.kill()
            raise

    def wait_ready(self, *, deadline_s: float = 120) -> None:
        """Wait until each node answers and knows all the others.

        Raises:
            StreamdError: A node has ended.
            TimedOut: They have not come up after `deadline_s`.
        """
        deadline = time.monotonic() + deadline_s
        for node in self.nodes:
            client: AdminClient | None = None
            while True:
                if not node.is_alive():
                    raise StreamdError(
                        f"node {node.number} of the broker ended while it started",
                        seen=node.last_lines(),
                    )
                if client is None and _listens(node.host, node.port):
                    # Made only now: one that was refused waits longer and longer.
                    client = AdminClient({"bootstrap.servers": node.address, "log_level": 0})
                if client is not None and _knows(client, len(self.nodes)):
                    break
                if time.monotonic() > deadline:
                    raise TimedOut(
                        f"node {node.number} of the broker does not answer after "
                        f"{deadline_s:.0f} s",
                        seen=node.last_lines(),
                    )
                time.sleep(0.02)

    def is_running(self) -> bool:
        """True while all nodes have a process."""
        return all(node.is_alive() for node in self.nodes)

    def kill(self) -> None:
        """End all nodes at once; the data stays."""
        for node in self.nodes:
            node.kill()

    def remove(self) -> None:
        """End all nodes at once and delete all that they stored."""
        self.kill()
        shutil.rmtree(self.folder)

    def port_was_taken(self) -> bool:
        """True where a node could not start as its port was in use."""
        return any("Address already in use" in " ".join(n.last_lines(40)) for n in self.nodes)

    def _properties(self, node: Node) -> dict[str, str]:
        copies = str(min(3, len(self.nodes)))
        in_sync = str(2 if len(self.nodes) > 2 else 1)
        controller = f"127.0.0.1:{node.controller_port}"
        return {
            "process.roles": "broker,controller",
            "node.id": str(node.number),
            "controller.quorum.voters": ",".join(
                f"{each.number}@127.0.0.1:{each.controller_port}" for each in self.nodes
            ),
            "listeners": f"PLAINTEXT://{node.address},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{node.address}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(node.folder / "data"),
            # A topic that appears by itself would hide that nobody declared it.
            "auto.create.topics.enable": "false",
            "default.replication.factor": copies,
            "min.insync.replicas": in_sync,
            # 50 partitions by default, each with its files: seconds at the first group.
            "offsets.topic.num.partitions": "4",
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.num.partitions": "4",
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": in_sync,
            "share.coordinator.state.topic.num.partitions": "1",
            "share.coordinator.state.topic.replication.factor": copies,
            "share.coordinator.state.topic.min.isr": in_sync,
            # A node that crashed is refused until the session of its last life is over.
            "broker.heartbeat.interval.ms": "500",
            "broker.session.timeout.ms": "3000",
            # Tests let members fail and join in less time than Kafka's defaults allow.
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            # By the newer protocol a member hears of others at its next heartbeat.
            "group.consumer.min.heartbeat.interval.ms": "500",
            "group.consumer.heartbeat.interval.ms": "500",
            "log.cleaner.backoff.ms": "1000",
            # A transaction whose process died is aborted when its time is over, not later.
            "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",
            "log.cleaner.dedupe.buffer.size": str(16 << 20),
        }


def start(
    folder: Path,
    *,
    nodes: int = 1,
    host: str = LOOPBACK,
    port: int | None = None,
    settings: Mapping[str, str] | None = None,
    listeners: Mapping[str, int] | None = None,
    flags: Sequence[str] = QUICK,
    parent: int = 0,
) -> Cluster:
    """The cluster in `folder`, running: made, or started, where it is not.

    Blocks until it answers; the first time, until it is downloaded. Nodes that crashed are
    started again on their data and ports.

    Raises:
        Busy: One that was made otherwise is there, or the port is taken.
        StreamdError: It cannot be fetched, or does not start.
    """
    with _alone(folder):
        cluster = Cluster.find(folder)
        if cluster is not None:
            _refuse_another(cluster, nodes, port)
            cluster.start(flags=flags, parent=parent)
            return cluster
        for left in reversed(range(TRIES)):
            shutil.rmtree(folder, ignore_errors=True)
            made = Cluster.make(
                folder,
                nodes=nodes,
                host=host,
                port=port,
                settings=settings,
                listeners=listeners,
            )
            try:
                made.start(flags=flags, parent=parent)
                return made
            except BaseException:
                # Between the choice of a free port and its use, another may take it.
                taken = made.port_was_taken()
                made.remove()
                if not (left and taken and port is None):
                    raise
    raise AssertionError("unreachable")


def stop(folder: Path) -> bool:
    """End the cluster in `folder` and delete its data; False where there is none."""
    with _alone(folder):
        cluster = Cluster.find(folder)
        if cluster is not None:
            cluster.kill()
        shutil.rmtree(folder, ignore_errors=True)
        return cluster is not None


def _refuse_another(cluster: Cluster, nodes: int, port: int | None) -> None:
    if len(cluster.nodes) != nodes or port not in (None, cluster.nodes[0].port):
        raise Busy(
            f"a broker of {len(cluster.nodes)} at {cluster.url} is there, not one of {nodes}"
            + (f" on port {port}" if port else ""),
            remedy="scripts/kafka stop",
        )


def wait_ended(pidfd: int, *, deadline_s: float) -> bool:
    """Wait until the process of a pidfd has ended; False where it has not in time."""
    return bool(select.select([pidfd], [], [], deadline_s)[0])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock beside `folder`, which outlives it."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_ports(count: int, first: int | None, nodes: int) -> list[int]:
    """Free ports: those of the brokers, of which `first` is given or not, then the others."""
    found: list[int] = []
    if first is not None:
        found = list(range(first, first + nodes))
        for port in found:
            if not _is_free(port):
                raise Busy(
                    f"port {port} of 127.0.0.1 is taken",
                    remedy="choose another with --port, or none for a free one",
                )
    for port in random.sample(PORTS, len(PORTS)):
        if len(found) == count:
            return found
        if port not in found and _is_free(port):
            found.append(port)
    raise Busy(f"no free port from {PORTS.start} to {PORTS.stop - 1}", remedy="give --port")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As Java does it: a port whose last connection lingers can be had.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _knows(client: AdminClient, nodes: int) -> bool:
    try:
        return len(client.list_topics(timeout=1).brokers) == nodes
    except KafkaException:
        return False
