"""A master that only forks: it drives the real zygote as the supervisor does.

As a script it starts a zygote and two processes, prints all pids and waits to be killed.
"""

import asyncio
import ctypes
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import streamd
from streamd.agentproc.broker.embedded import EmbeddedBroker
from streamd.wire import (
    Fork,
    Forked,
    ForkFailed,
    FrameReader,
    GroupPlan,
    Hello,
    Import,
    ImportFailed,
    Message,
    Plan,
    Ready,
    encode_frame,
)

M = TypeVar("M", bound=Message)

START = Path(streamd.__file__).parent / "agentproc" / "start.py"
WITHIN_S = 10.0


def become_subreaper() -> None:
    """Adopt the processes that the zygote forks, for ever."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(36, 1, 0, 0, 0) == 0


def eventually(condition: Callable[[], object], within_s: float = WITHIN_S) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {within_s} s: {condition}"
        time.sleep(0.005)


def connected(address: str, request: Message) -> socket.socket:
    """A connection over which `request` was sent."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(WITHIN_S)
        connection.connect(address)
        connection.sendall(encode_frame(1, request))
    except OSError:
        connection.close()
        raise
    return connection


def answer_of(connection: socket.socket) -> Message:
    """The answer to the request that was sent; closes the connection."""
    with connection:
        reader = FrameReader()
        while data := connection.recv(65536):
            for id, answer in reader.feed(data):
                assert id == -1
                return answer
    raise AssertionError("the connection was closed without an answer")


def talk(address: str, request: Message) -> Message:
    """The answer of whoever listens at `address`."""
    return answer_of(connected(address, request))


class End:
    """One end of a link, blocking."""

    def __init__(self) -> None:
        self.socket, self.other = socket.socketpair()
        self.seen: list[Message] = []
        self._reader = FrameReader()

    def send(self, message: Message, descriptors: list[int] | None = None) -> None:
        frame = encode_frame(0, message)
        if descriptors:
            socket.send_fds(self.socket, [frame], descriptors)
        else:
            self.socket.sendall(frame)

    def wait(self, kind: type[M], within_s: float = WITHIN_S) -> M:
        """The next message of `kind`; others are kept in `seen`."""
        deadline = time.monotonic() + within_s
        start = len(self.seen)
        while True:
            for message in self.seen[start:]:
                start += 1
                if isinstance(message, kind):
                    return message
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"no {kind.__name__} in {within_s} s, only {self.seen}"
            if select.select([self.socket], [], [], left_s)[0]:
                data = self.socket.recv(65536)
                assert data, f"the link was closed before a {kind.__name__}: {self.seen}"
                self.seen += [message for _, message in self._reader.feed(data)]

    def take(self, kind: type[M]) -> M:
        """The first message of `kind` that nobody took yet."""
        for message in self.seen:
            if isinstance(message, kind):
                break
        else:
            message = self.wait(kind)
        self.seen.remove(message)
        return message

    def drain(self) -> list[Message]:
        """Everything that was sent until the other end closed."""
        while data := self.socket.recv(65536):
            self.seen += [message for _, message in self._reader.feed(data)]
        return self.seen

    def close(self) -> None:
        self.socket.close()


class Child:
    """A process that was forked for the master."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.pid = 0
        self.link = End()
        self._log, self.log_end = os.pipe()
        os.set_blocking(self._log, False)
        self.page = os.memfd_create("page")
        os.ftruncate(self.page, 4096)
        self.dump = os.memfd_create("dump")
        self._logged = b""
        self._exit: int | None = None

    def descriptors(self) -> list[int]:
        return [self.link.other.fileno(), self.log_end, self.page, self.dump]

    def let_go(self) -> None:
        self.link.other.close()
        os.close(self.log_end)

    def wait_ready(self) -> "Child":
        self.link.take(Ready)
        return self

    def fields(self) -> tuple[float, int, int, float, int, float]:
        """The numbers of the beat page."""
        fields: tuple[float, int, int, float, int, float] = struct.unpack(
            "dqqdqd", os.pread(self.page, 48, 0)
        )
        return fields

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def exit_code(self, within_s: float = WITHIN_S) -> int:
        """Wait for its end; negative: killed by that signal."""
        deadline = time.monotonic() + within_s
        while self._exit is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                pid = 0  # not adopted yet: the process between has told its pid and still ends
            if pid:
                self._exit = os.waitstatus_to_exitcode(status)
                break
            assert time.monotonic() < deadline, f"{self.pid} runs on: {self.log()}"
            time.sleep(0.002)
        assert self._exit is not None
        return self._exit

    def log(self) -> str:
        try:
            while data := os.read(self._log, 65536):
                self._logged += data
        except BlockingIOError:
            pass
        return self._logged.decode()

    def wait_logged(self, text: str) -> None:
        eventually(lambda: text in self.log())

    def dumped(self) -> str:
        return os.pread(self.dump, 1 << 20, 0).decode()

    def close(self) -> None:
        if self._exit is None and self.pid:
            try:
                os.kill(self.pid, signal.SIGKILL)
                self.exit_code()
            except (ProcessLookupError, ChildProcessError):
                self._exit = 0
        self.link.close()
        for fd in (self._log, self.page, self.dump):
            os.close(fd)


class Master:
    """Runs the zygote on an app module `proj` with the given source."""

    def __init__(self, folder: Path, source: str, **environ: str) -> None:
        self.folder = folder
        (folder / "proj.py").write_text(source)
        self.datadir = folder / "data"
        self.datadir.mkdir(exist_ok=True)
        # Short: the paths of sockets are limited to 107 bytes.
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="sd-"))
        self.end = End()
        self.children: list[Child] = []
        self.output = (folder / "zygote.out").open("w+b")
        self.zygote = subprocess.Popen(
            [sys.executable, "-P", str(START), str(self.end.other.fileno())],
            pass_fds=[self.end.other.fileno()],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(streamd.__file__).parent.parent),
                "STREAMD_TREE": "tree-of-this-test",
                **environ,
            },
            stdout=self.output,
            stderr=self.output,
        )
        self.end.other.close()

    def send_import(self, **options: str) -> None:
        self.end.send(Import("proj", options, None, False))

    def import_app(self, **options: str) -> Hello:
        self.send_import(**options)
        answer = self.end.wait(Message, 30.0)
        assert isinstance(answer, Hello), answer
        self.hello = answer
        return answer

    def import_failure(self) -> ImportFailed:
        self.send_import()
        answer = self.end.wait(Message, 30.0)
        assert isinstance(answer, ImportFailed), answer
        return answer

    def declare(self) -> "Master":
        """Make the topics and tables, as the log's process does."""
        hello = self.hello

        async def declare() -> None:
            broker = EmbeddedBroker(self.datadir, self.runtime_dir)
            await broker.declare(hello.topics, hello.tables, hello.groups)
            await broker.close()

        asyncio.run(declare())
        return self

    def plan(self, process: str = "app#0", *, slots: int = 1, leader: bool = True) -> Plan:
        group, _, slot = process.partition("#")
        return Plan(
            process=process,
            groups=[GroupPlan(group, int(slot), slots)],
            address=str(self.runtime_dir / f"{process}.sock"),
            runtime_dir=str(self.runtime_dir),
            datadir=str(self.datadir),
            careful=False,
            parked=[],
            leader=leader,
            alone=False,
        )

    def fork(self, plan: Plan | None = None) -> Child:
        return self.fork_all([plan or self.plan()])[0]

    def fork_all(self, plans: Iterable[Plan]) -> list[Child]:
        """Ask for all, then wait for all."""
        children = [self._ask_fork(plan) for plan in plans]
        for child in children:
            forked = self.end.take(Forked)
            while self.children[forked.id].pid == forked.pid:
                forked = self.end.take(Forked)  # both sides of a fork tell of it
            assert self.children[forked.id] is child
            child.pid = forked.pid
        return children

    def fork_failure(self, plan: Plan) -> str:
        """Why a fork failed."""
        self._ask_fork(plan)
        return self.end.take(ForkFailed).error

    def _ask_fork(self, plan: Plan) -> Child:
        child = Child(plan)
        self.end.send(Fork(len(self.children), plan), child.descriptors())
        child.let_go()
        self.children.append(child)
        return child

    def text(self) -> str:
        """What the zygote wrote."""
        return (self.folder / "zygote.out").read_text()

    def close(self) -> None:
        self.end.close()
        for child in self.children:
            child.close()
        self.zygote.wait(10)
        self.output.close()
        shutil.rmtree(self.runtime_dir, ignore_errors=True)


def main() -> None:
    become_subreaper()
    folder = Path(sys.argv[1])
    master = Master(folder, (folder / "proj.py").read_text())
    master.import_app()
    master.declare()
    children = [master.fork(master.plan()).wait_ready(), master.fork(master.plan("app#1"))]
    children[0].wait_logged("blocks")
    pids = [master.zygote.pid, *(child.pid for child in children)]
    sys.stdout.write(" ".join(map(str, pids)) + "\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main()
