"""What systemd is told, and what it hands over: a fake notify socket, real sockets."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor_tree import IDLE, ROOT, Tree, eventually, tree_of

# An agent process ends before it is ready: one that is forked, and no child of the zygote.
CRASHES_UNTIL_HEALED = """
import os, pathlib
import streamd
app = streamd.App("proj")
zygote = os.getpid()

def crash():
    if os.getppid() != zygote and not pathlib.Path("healed").exists():
        os._exit(5)

os.register_at_fork(after_in_child=crash)
"""


class Systemd:
    """The end that systemd would have, and all that came to it."""

    def __init__(self, place: Path) -> None:
        self.address = str(place / "notify")
        self._told: list[str] = []
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._end.bind(self.address)

    @property
    def told(self) -> list[str]:
        """Every line so far, in order."""
        self._end.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._told += self._end.recv(65536).decode().splitlines()
        return self._told

    def is_silent(self, span_s: float) -> bool:
        """True if nothing comes for so long."""
        self._end.settimeout(span_s)
        try:
            self._end.recv(65536)
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        self._end.close()


@contextlib.contextmanager
def systemd_of(source: str = IDLE) -> Iterator[tuple[Tree, Systemd]]:
    with tree_of(source) as house:
        systemd = Systemd(house.place)
        try:
            yield house, systemd
        finally:
            systemd.close()


def begin(house: Tree, systemd: Systemd, watchdog_us: int = 1_000_000, **changes: str) -> None:
    variables = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": str(watchdog_us)}
    house.start(variables, **changes)
    assert "ready" in house.wait_ready(60), house.log


def test_it_is_told_ready_reloading_ready_stopping_in_this_order() -> None:
    with systemd_of() as (house, systemd):
        begin(house, systemd)
        eventually(lambda: "READY=1" in systemd.told)
        before_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        house.signal(signal.SIGHUP)
        eventually(lambda: systemd.told.count("READY=1") == 2, 20)
        house.signal(signal.SIGTERM)
        assert house.wait_exit() == 0

        words = ("READY=1", "RELOADING=1", "STOPPING=1")
        order = [line for line in systemd.told if line in words]
        assert order == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]
        told = systemd.told
        moment = told[told.index("RELOADING=1") + 1]
        name, _, moment_us = moment.partition("=")
        assert name == "MONOTONIC_USEC"
        assert (
            before_us <= int(moment_us) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        )
        assert told.index("EXTEND_TIMEOUT_USEC=30000000") < told.index("READY=1")


def test_children_cannot_speak_to_systemd() -> None:
    with systemd_of() as (house, systemd):
        begin(house, systemd)

        for name in ("zygote", "log", "app#0"):
            environment = Path(f"/proc/{house.pid(name)}/environ").read_bytes()
            for word in (b"NOTIFY", b"WATCHDOG", b"LISTEN", b"STREAMD_GUARDIAN"):
                assert word not in environment


def test_ready_waits_for_every_group_and_the_status_says_for_which() -> None:
    with systemd_of(CRASHES_UNTIL_HEALED) as (house, systemd):
        begin(house, systemd, option_fatal_retry="1s")

        eventually(lambda: any("app#0 is FATAL" in line for line in systemd.told), 40)
        assert "READY=1" not in systemd.told
        asked = systemd.told.count("EXTEND_TIMEOUT_USEC=30000000")
        eventually(lambda: systemd.told.count("EXTEND_TIMEOUT_USEC=30000000") > asked)
        (house.place / "healed").touch()

        eventually(lambda: "READY=1" in systemd.told, 20)
        eventually(lambda: "STATUS=All 3 processes run; 0 events behind." in systemd.told)


def test_the_watchdog_is_fed_only_while_the_master_s_loop_turns() -> None:
    with systemd_of() as (house, systemd):
        begin(house, systemd)
        master = house.pid("master")
        eventually(lambda: systemd.told.count("WATCHDOG=1") > 2)

        os.kill(master, signal.SIGSTOP)
        eventually(lambda: systemd.is_silent(1.5), 20)
        fed = systemd.told.count("WATCHDOG=1")
        os.kill(master, signal.SIGCONT)

        eventually(lambda: systemd.told.count("WATCHDOG=1") > fed)


def test_half_a_watchdog_s_time_passes_between_two_signs_of_life() -> None:
    with systemd_of() as (house, systemd):
        begin(house, systemd, watchdog_us=1_000_000)
        began, fed = time.monotonic(), systemd.told.count("WATCHDOG=1")

        eventually(lambda: systemd.told.count("WATCHDOG=1") >= fed + 8, 30)

        # Twice a second; a busy machine makes it slower, never faster than the loop's tick.
        assert time.monotonic() - began < 8 * 1.0


def test_a_master_that_the_watchdog_gives_up_shows_its_stack_and_all_of_it_ends() -> None:
    with systemd_of() as (house, systemd):
        begin(house, systemd)
        master = house.pid("master")
        os.kill(master, signal.SIGSTOP)

        # What systemd sends to its main process.
        house.signal(signal.SIGABRT)

        assert house.wait_exit() == 70
        said = (house.place / "guardian.txt").read_text()
        assert "Fatal Python error: Aborted" in said and "begin.py" in said
        assert "was ended by SIGABRT" in house.log
        house.wait_nothing_left(5)


# What hands descriptors over as systemd does: from 3 on, named, for one pid.
HANDS_OVER = """
import fcntl, os, sys
owner, names, *command = sys.argv[1:]
fds = [int(fd) for fd in os.environ.pop("FDS").split()]
high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]
for number, fd in enumerate(high, 3):
    os.dup2(fd, number)
os.closerange(3 + len(fds), 256)
os.environ |= {
    "LISTEN_PID": owner.replace("mine", str(os.getpid())),
    "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names,
}
os.execv(command[0], command)
"""


class Place:
    """A folder with an app that is started with sockets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "proj.py").write_text(IDLE)
        self.environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "STREAMD_RUNTIME_DIR": str(path / "run"),
            "STREAMD_DATADIR": str(path / "data"), "STREAMD_LOG_FORMAT": "text",
        }  # fmt: skip
        self.output = path / "output.txt"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, command: list[str], fds: list[int], words: list[str]
    ) -> "subprocess.Popen[bytes]":
        with self.output.open("ab") as output:
            process = subprocess.Popen(
                [*command, sys.executable, "-m", "streamd", "start", "-A", "proj", *words],
                cwd=self.path, env={**self.environment, "FDS": " ".join(map(str, fds))},
                stdout=output, stderr=output, pass_fds=fds,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def handed(
        self, fds: list[int], names: str, *words: str, owner: str = "mine"
    ) -> "subprocess.Popen[bytes]":
        return self.start([sys.executable, "-c", HANDS_OVER, owner, names], fds, [*words])

    @property
    def said(self) -> str:
        return self.output.read_text()

    def stop(self, process: "subprocess.Popen[bytes]") -> int:
        process.send_signal(signal.SIGTERM)
        return process.wait(30)


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="sv", dir="/tmp") as folder:
        place = Place(Path(folder))
        yield place
        subprocess.run(
            [sys.executable, "-m", "streamd", "kill", "--tree", "--name", "proj"],
            env=place.environment, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        for process in place.processes:
            process.kill()
            process.wait(30)


def health(port: int) -> int:
    """The status of /healthz at this port; 0: nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def test_the_web_port_is_the_socket_that_systemd_hands_over(place: Place) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as web,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        port = web.getsockname()[1]
        process = place.handed([other.fileno(), web.fileno()], "other:web")

        eventually(lambda: health(port) == 200, 30)

        assert f"the web port is systemd's: http://127.0.0.1:{port}" in place.said
        assert "the socket 'other' of systemd serves nothing here: it is closed" in place.said
        [agent] = processes(place, "app#0")
        assert b"LISTEN" not in Path(f"/proc/{agent}/environ").read_bytes()
        assert inode_of(web) not in links_of(agent)
        for name in ("guardian", "master"):
            [pid] = processes(place, name)
            assert inode_of(other) not in links_of(pid)
        # It stays open between two masters: who connects meanwhile is served by the next.
        assert place.stop(process) == 0
        waiting = socket.create_connection(("127.0.0.1", port))
        again = place.handed([web.fileno()], "proj.socket")
        waiting.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        waiting.settimeout(30)
        assert waiting.recv(100).startswith(b"HTTP/1.1 200")
        waiting.close()
        assert place.stop(again) == 0


def processes(place: Place, name: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-m", "streamd", "--json", "status", "--name", "proj"],
        env=place.environment, capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    rows = json.loads(done.stdout)["processes"]
    return [row["pid"] for row in rows if row["name"] == name]


def inode_of(end: socket.socket) -> str:
    return os.readlink(f"/proc/self/fd/{end.fileno()}")


def links_of(pid: int) -> list[str]:
    """What the descriptors of a process are."""
    return [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]


def test_sockets_for_another_process_are_ignored(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as web:
        process = place.handed([web.fileno()], "web", "-F", "-p", "0", owner="1")

        eventually(lambda: "is ready after" in place.said, 30)

        assert f":{web.getsockname()[1]}" not in place.said
        assert "systemd's" not in place.said
        assert place.stop(process) == 0


def test_a_descriptor_that_is_no_socket_is_refused_with_the_cure(place: Place) -> None:
    with (place.path / "file").open("w") as file:
        process = place.handed([file.fileno()], "web")

        assert process.wait(30) == 78
        assert "descriptor 3 of LISTEN_FDS is no socket" in place.said
        assert "ListenStream=" in place.said


def test_a_socket_that_takes_no_connections_is_refused_with_the_cure(place: Place) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        process = place.handed([datagrams.fileno()], "web")

        assert process.wait(30) == 78
        assert "the socket 'web' of systemd takes no connections" in place.said
        assert "Accept=no" in place.said


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="needs systemd-socket-activate"
)
def test_systemd_s_own_tool_starts_it_when_the_first_visitor_comes(place: Place) -> None:
    path = place.path / "web.sock"
    tool = ["systemd-socket-activate", f"--listen={path}", "--fdname=web"]
    for name in ("PYTHONPATH", "STREAMD_RUNTIME_DIR", "STREAMD_DATADIR"):
        tool.append(f"--setenv={name}={place.environment[name]}")
    process = place.start(tool, [], [])

    with socket.socket(socket.AF_UNIX) as visitor:
        visitor.settimeout(30)
        eventually(lambda: is_connected(visitor, path), 20)
        visitor.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert visitor.recv(100).startswith(b"HTTP/1.1 200"), place.said

    assert place.stop(process) == 0


def is_connected(visitor: socket.socket, path: Path) -> bool:
    """True once somebody listens there: the file exists a moment before."""
    try:
        visitor.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True
