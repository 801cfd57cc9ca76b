"""A run of random attacks on an app on Kafka: its processes, its hosts, its broker."""

import contextlib
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from chaos_kills import Attacker, Report
from chaos_oracle import drain, problems
from chaos_tree import Load, Tree, complaints, eventually, instance, kill

ATTACKS = {
    "agent": 60,
    "agents": 6,
    "zygote": 4,
    "log": 4,
    "all": 3,
    "zombie": 5,  # stopped past its session, and continued
    "master": 4,
    "guardian": 2,
    "warm": 3,
    "cold": 2,
    "scale": 4,
    "host": 8,  # another host joins, or leaves: warm or by a crash
    "broker": 3,  # ended as by a crash, and started on what it has
}
SESSION_S = 3.0
SETTINGS = {
    "STREAMD_BROKER_SESSION_TIMEOUT": str(SESSION_S),
    # A process that is stopped is to find out by itself that it is no member any more.
    "STREAMD_HANG_LIMIT": "20",
    "STREAMD_WEB_ENABLED": "false",
}


class Cluster(Protocol):
    """What is asked of the broker: see tests/kafka/kafka_broker.py."""

    bootstrap: str

    def kill(self) -> None:
        """End every node at once."""

    def start(self) -> None:
        """Start the nodes on their data, and wait until they answer."""


class Hosts:
    """The attacks that only an app on a cluster knows."""

    def __init__(self, made: Tree, cluster: Cluster, folder: Path) -> None:
        self._made = made
        self._cluster = cluster
        settings = {k: v for k, v in made.environment.items() if k.startswith("STREAMD_")}
        (folder / "run").mkdir()
        self._other = Tree(folder, made.broker, settings, made)
        self._other.environment["STREAMD_RUNTIME_DIR"] = str(folder / "run")
        self._there = False

    def ways(self) -> dict[str, Callable[[random.Random], bool]]:
        """Each attack by its name."""
        return {
            "zombie": self._zombie, "scale": self._scale, "host": self._host,
            "broker": self._broker,
        }  # fmt: skip

    def close(self) -> None:
        """End the other host."""
        self._other.kill_all()

    def leave(self) -> None:
        """Stop the other host warm, so that all is with the first in the end."""
        if self._there:
            self._other.stop()
            self._there = False

    def log_of_other(self) -> Path:
        return self._other.logfile

    def _zombie(self, chance: random.Random) -> bool:
        pids = self._made.processes()
        agents = sorted(name for name in pids if "#" in name)
        if not agents:
            return False
        pid = pids[chance.choice(agents)]
        if not kill(pid, signal.SIGSTOP):
            return False
        # The attacks go on meanwhile.
        threading.Timer(
            SESSION_S + chance.uniform(0.2, 2.5), kill, (pid, signal.SIGCONT)
        ).start()
        return True

    def _scale(self, chance: random.Random) -> bool:
        answer = self._made.ask(
            "scale", 30.0, group="count", processes=chance.choice([1, 2, 3])
        )
        return answer is not None

    def _host(self, chance: random.Random) -> bool:
        if not self._there:
            self._other.start()
            self._there = True
        elif chance.random() < 0.5:
            self.leave()
        else:
            pids = self._other.processes()
            if "guardian" in pids:
                kill(pids["guardian"])
            self._other.assert_nothing_left(10.0)
            self._there = False
        return True

    def _broker(self, chance: random.Random) -> bool:
        self._cluster.kill()
        time.sleep(chance.uniform(0.0, 1.0))
        self._cluster.start()
        return True


def run_on_kafka(
    cluster: Cluster,
    attacks: int,
    seed: int,
    guarantee: str,
    *,
    only: tuple[str, ...] = (),
    pause_s: float = 0.25,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Start, attack, drain, stop, compare.

    Args:
        only: Names of attacks; all where there are none.
    """
    report = Report(seed)
    began_at = time.monotonic()
    chance = random.Random(seed)
    weights = {name: n for name, n in ATTACKS.items() if not only or name in only}
    settings = {
        **SETTINGS,
        "STREAMD_PROCESSING_GUARANTEE": guarantee,
        # Half of the runs: a copy on the other host must never be more than what counts.
        "STREAMD_TABLE_STANDBY_REPLICAS": str(seed % 2),
    }
    with (
        instance(cluster.bootstrap, settings) as made,
        tempfile.TemporaryDirectory(prefix="sc-") as folder,
        contextlib.closing(Hosts(made, cluster, Path(folder))) as hosts,
    ):
        made.start(chance.choice(["start", "worker"]))
        attacker = Attacker(made, seed, weights, hosts.ways())
        with Load(made, seed) as load:
            eventually(lambda: load.batches > 3, "events flow", 30.0)
            while (spent := attacker.spent.total()) < attacks:
                time.sleep(chance.uniform(0.0, 2 * pause_s))
                attacker.strike()
                if attacker.spent.total() // 25 > spent // 25:
                    took_s = time.monotonic() - began_at
                    progress(f"{spent + 1} attacks, {len(load.acked)} records, {took_s:.0f} s")
            hosts.leave()
            before = load.batches
            eventually(lambda: load.batches > before, "events flow in the end", 60.0)
        eventually(lambda: made.state() == "running", "all runs in the end", 60.0)
        drain(made)
        made.stop()
        report.spent, report.events = attacker.spent, len(load.acked)
        report.problems = problems(made, load.acked)
        report.complaints = complaints(made)
        report.took_s = time.monotonic() - began_at
        assert not report.problems, str(report)
    return report
