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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from streamd.agentproc.broker.embedded import EmbeddedBroker
from streamd.wire import (
    Fork,
    Forked,
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
        self.link.wait(Ready)
        return self

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def exit_code(self, within_s: float = WITHIN_S) -> int:
        """Wait for its end; negative: killed by that signal."""
        deadline = time.monotonic() + within_s
        while self._exit is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
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
            [sys.executable, "-m", "streamd.agentproc.zygote", str(self.end.other.fileno())],
            pass_fds=[self.end.other.fileno()],
            cwd=folder,
            env={**os.environ, "STREAMD_TREE": "tree-of-this-test", **environ},
            stdout=self.output,
            stderr=self.output,
        )
        self.end.other.close()

    def import_app(self, app: str = "proj", *, alone: bool = False, **options: str) -> Hello:
        self.end.send(Import(app, options, None, alone))
        answer = self.end.wait(Message, 30.0)
        assert isinstance(answer, Hello), answer
        self.hello = answer
        return answer

    def import_failure(self, app: str = "proj") -> ImportFailed:
        self.end.send(Import(app, {}, None, False))
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
        child = Child(plan or self.plan())
        self.end.send(Fork(len(self.children), child.plan), child.descriptors())
        child.let_go()
        forked = self.end.wait(Forked)
        assert forked.id == len(self.children)
        child.pid = forked.pid
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
    pids = [master.zygote.pid, *(child.pid for child in children)]
    sys.stdout.write(" ".join(map(str, [*pids, *map(int, children[0].log().split())])) + "\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main()
