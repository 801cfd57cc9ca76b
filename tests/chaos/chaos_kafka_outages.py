"""Long trouble with a cluster: it is away, its nodes are restarted in turn, its disk is full.

An app of each guarantee counts words under load meanwhile. In the end the tables are compared
with what was sent, and no process may have been restarted.
"""

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kafka_broker
from kafka_broker import Cluster
from kafka_hosts import eventually
from kafka_trouble import EXACTLY_ONCE, App, app

SAY_S = 60.0
CATCH_UP_S = 300.0
DISK_MB = 160
SPACE_MB = 1000

Say = Callable[[str], None]


def outage(minutes: float, say: Say) -> list[str]:
    """The broker is killed, and away for so long; what is wrong in the end."""
    with _folder() as folder:
        cluster = kafka_broker.start(folder / "kafka", parent=os.getpid())
        with _removed(cluster), _apps(cluster, folder) as apps:
            cluster.kill()
            _wait(minutes * 60, apps, say)
            cluster.start()
            return _verdict(apps, say)


def rolling(rounds: int, say: Say) -> list[str]:
    """Three nodes are stopped and started, one after the other; what is wrong in the end."""
    with _folder() as folder:
        cluster = kafka_broker.start(folder / "kafka", nodes=3, parent=os.getpid())
        copies = {"STREAMD_TOPIC_REPLICATION_FACTOR": "3"}
        with _removed(cluster), _apps(cluster, folder, **copies) as apps:
            for number in range(rounds * 3):
                node = cluster.nodes[number % 3]
                node.stop()
                _flow(apps)
                node.start(parent=os.getpid())
                cluster.wait_ready()
                _flow(apps)
                say(f"node {node.number} was restarted; {_sent(apps)} words were sent")
            return _verdict(apps, say)


def full_disk(say: Say) -> list[str]:
    """The broker's disk is full, and it ends; there is space, and it is started anew.

    Must be run by root, who may mount.
    """
    with _folder() as folder:
        disk = folder / "disk"
        disk.mkdir()
        _mount("-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk))
        try:
            cluster = kafka_broker.start(disk / "kafka", parent=os.getpid())
            with _removed(cluster), _apps(cluster, folder) as apps:
                (disk / "filling").write_bytes(b"")
                _fill(disk / "filling")
                eventually(lambda: not cluster.is_running(), 120)
                say("the disk is full, and the broker has ended")
                _wait(10, apps, say)
                _mount("-o", f"remount,size={SPACE_MB}m", str(disk))
                cluster.start()
                return _verdict(apps, say)
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def _fill(path: Path) -> None:
    """Leave nothing free; what others free meanwhile is taken as well."""
    with path.open("ab", buffering=0) as file:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                file.write(bytes(1 << 16))
            except OSError:
                time.sleep(0.05)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="so-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _removed(cluster: Cluster) -> Iterator[None]:
    try:
        yield
    finally:
        cluster.remove()


@contextlib.contextmanager
def _apps(cluster: Cluster, folder: Path, **settings: str) -> Iterator[list[App]]:
    """One of each guarantee, fed and counting."""
    with (
        app(cluster, folder, **settings) as default,
        app(cluster, folder, **settings, **EXACTLY_ONCE) as exact,
    ):
        apps = [default, exact]
        for each in apps:
            each.start()
        yield apps


def _flow(apps: list[App]) -> None:
    for each in apps:
        each.flows()


def _sent(apps: list[App]) -> int:
    return sum(sum(each.feeder.counts.values()) for each in apps)


def _wait(seconds: float, apps: list[App], say: Say) -> None:
    until = time.monotonic() + seconds
    while (left_s := until - time.monotonic()) > 0:
        time.sleep(min(left_s, SAY_S))
        for each in apps:
            status = each.host.status()
            say(f"{status.get('state')}: {status.get('sentence')}")


def _verdict(apps: list[App], say: Say) -> list[str]:
    wrong = []
    began_at = time.monotonic()
    for each, guarantee in zip(apps, ("at_least_once", "exactly_once"), strict=True):
        try:
            each.flows()
            say(f"{guarantee}: events flow {time.monotonic() - began_at:.0f} s later")
            each.ends_exact(CATCH_UP_S)
        except AssertionError as error:
            wrong.append(f"{guarantee}: {error}")
        if restarts := each.restarts():
            wrong.append(f"{guarantee}: {restarts} restarts")
        lines = each.lines()
        say(f"{guarantee}: {_sent([each])} words, {len(lines)} lines above INFO")
    return wrong
