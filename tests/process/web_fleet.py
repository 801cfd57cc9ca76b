"""A master and an agent process, as small as they can be, around the real web process.

The master's end of the link and the agent processes' sockets are real and speak frames; only
what an app would compute is made up here.
"""

import asyncio
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from streamd.link import Answer, Link, adopt, serve
from streamd.partition import partition_for
from streamd.wire import (
    Found,
    LookupText,
    Message,
    Missing,
    Moved,
    Owner,
    Owners,
    PageReply,
    PageRequest,
    Ready,
    RoutedKey,
    RouteInfo,
    RouteKey,
    Scan,
    Scanned,
    Site,
    Snapshot,
    TableInfo,
    Unavailable,
)

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
PARTITIONS = 8


def table(name: str = "word_counts", codec: str = "raw", type_name: str = "str") -> TableInfo:
    return TableInfo(name, "count_words", PARTITIONS, "Counts", codec, type_name, "str", "int")


def route(id: int, path: str, methods: list[str], **more: Any) -> RouteInfo:
    fields = {"table": None, "match_info": None, "query_param": None} | more
    group = "count_words" if fields["table"] else "app"
    return RouteInfo(
        id, path, methods, f"page{id}", group, fields["table"], fields["match_info"],
        fields["query_param"], "",
    )  # fmt: skip


ROUTES = [
    route(1, "/count/{word}/", ["GET"], table="word_counts", match_info="word"),
    route(2, "/count/", ["GET"], table="word_counts", query_param="word"),
    route(3, "/hello/", ["GET"]),
    route(4, "/echo/", ["POST", "PUT"]),
    route(5, "/slow/", ["GET"]),
    route(6, "/die/", ["GET", "POST"]),
    route(7, "/odd/{word}/", ["GET"], table="odd", match_info="word"),
    route(8, "/bad/", ["GET"]),
    route(9, "/busy/", ["GET"]),
]


class Agent:
    """An agent process: answers for the partitions that it believes to have."""

    def __init__(self, name: str, folder: Path, slot: int, active: list[int]) -> None:
        self.name = name
        self.address = str(folder / f"{name}.sock")
        self.slot = slot
        self.active = active
        self.recovering: list[int] = []
        self.scattered: list[str] = []
        self.believes = set(active)
        self.counts: dict[str, int] = {}
        self.seen: list[PageRequest] = []
        self.slow_s = 30.0  # how long the page at /slow/ takes
        self.group = name.partition("#")[0]
        self._server: asyncio.Server | None = None
        self._links: list[Link] = []

    async def start(self) -> None:
        def connected(link: Link) -> bool:
            self._links.append(link)
            return True

        self._server = await serve(self.address, self.name, self._answer, on_connect=connected)

    async def die(self) -> None:
        """Go as a killed process goes: connections break, nobody listens."""
        if self._server is not None:
            self._server.close()
        os.unlink(self.address)
        for link in self._links:
            if link._transport is not None:
                link._transport.abort()
        self._links.clear()

    def owner(self) -> Owner:
        return Owner(
            self.group,
            self.name,
            self.address,
            self.slot,
            2,
            self.active,
            self.recovering,
            self.scattered,
        )

    async def _answer(self, link: Link, message: Message) -> Answer:
        match message:
            case PageRequest():
                self.seen.append(message)
                return await self._page(message)
            case LookupText(text=text, partition=partition):
                if partition not in {-1, *self.believes}:
                    return Moved(2)
                if text in self.counts:
                    partition = min(self.believes) if partition < 0 else partition
                    value = msgspec.json.encode(self.counts[text])
                    return Found(value, partition)
                return Missing(None if text.startswith("no") else b"0")
            case RouteKey(text=text):
                return RoutedKey(len(text) % PARTITIONS)
            case Scan(prefix=prefix):
                rows = [(w, str(n)) for w, n in self.counts.items() if w.startswith(prefix)]
                return Scanned(sorted(rows), len(rows))
        raise AssertionError(f"not expected: {message}")

    async def _page(self, request: PageRequest) -> Answer:
        if request.partition >= 0 and request.partition not in self.believes:
            return Moved(2)
        if request.route in {1, 2, 7}:
            word = request.match_info.get("word") or request.query.partition("=")[2]
            body = msgspec.json.encode({"word": word, "count": self.counts.get(word, 0)})
            return PageReply(200, [("content-type", "application/json")], body)
        if request.route == 4:
            headers = [("X-Method", request.method), ("Connection", "X-Method"), ("X-A", "1")]
            return PageReply(201, headers, request.body)
        if request.route == 5:
            await asyncio.sleep(self.slow_s)
        if request.route == 6:
            await self.die()
        if request.route == 8:
            return PageReply(200, [("X-Split", "a\r\nSet-Cookie: b")], b"")
        if request.route == 9:
            return Unavailable("what was written was taken back", 0.05)
        cookies = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]
        return PageReply(200, [("Content-Type", "text/plain"), *cookies], b"hello")


class WebFleet:
    """The web process, its master and agents; the loop runs in a thread of its own."""

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        routes: list[RouteInfo] | None = None,
        snapshot: dict[str, Any] | None = None,
        tables: list[TableInfo] | None = None,
    ) -> None:
        self.settings = settings or {}
        self.routes = ROUTES if routes is None else routes
        self.tables = tables or [table(), table("odd", "custom", "Thing")]
        self.snapshot = snapshot
        self.generation = 0
        self.port = 0
        self.ready = threading.Event()
        self.stderr = ""  # all that the web process wrote, once it has ended

    def __enter__(self) -> "WebFleet":
        self._stack = contextlib.ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sw-")))
        self._log = self._stack.enter_context(open(folder / "stderr", "w+"))
        self.agents = [
            Agent("count_words#0", folder, 0, [0, 1, 2, 3]),
            Agent("count_words#1", folder, 1, [4, 5, 6, 7]),
            Agent("app#0", folder, 0, []),
        ]
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        fds = (theirs.fileno(), listener.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-m", "streamd.webgw", *map(str, fds)],
            pass_fds=fds,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        theirs.close()
        listener.close()
        self.do(self._start(ours))
        assert self.ready.wait(15), "the web process did not get ready: " + self.errors()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.stderr = self.errors()
        self.do(self._end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self._stack.close()

    async def _start(self, end: socket.socket) -> None:
        async def take(link: Link, message: Message) -> Answer:
            if isinstance(message, Ready):
                self.ready.set()
            return None

        for agent in self.agents:
            await agent.start()
        self.link = await adopt(end, "web", take)
        self.link.send(Site("proj", "proj", self.routes, self.tables, self.settings))
        self._announce()
        if self.snapshot is not None:
            self.link.send(Snapshot(msgspec.json.encode(self.snapshot)))

    async def _end(self) -> None:
        self.link.close()
        for agent in self.agents:
            for link in agent._links:
                link.close()
            if agent._server is not None:
                agent._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)

    # What a test does.

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result(10)

    def _announce(self) -> None:
        self.generation += 1
        owners = [agent.owner() for agent in self.agents]
        self.link.send(Owners(self.generation, owners))

    def announce(self) -> None:
        """Tell the web process who has what now."""

        async def tell() -> None:
            self._announce()

        self.do(tell())

    def tell(self, message: Message) -> None:
        async def send() -> None:
            self.link.send(message)

        self.do(send())

    def show(self, snapshot: dict[str, Any]) -> None:
        self.tell(Snapshot(msgspec.json.encode(snapshot)))

    def owner_of(self, word: str) -> Agent:
        partition = partition_for(word.encode(), PARTITIONS)
        return next(agent for agent in self.agents if partition in agent.active)

    def connection(self, timeout_s: float = 10) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        connection = self.connection()
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            names = {name.lower(): value for name, value in reply.getheaders()}
            return reply.status, names, reply.read()
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("GET", path, headers=named)

    def raw(self, data: bytes, timeout_s: float = 5) -> bytes:
        """What comes back for these bytes, until the other end closes or is silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as conn:
            conn.sendall(data)
            got = b""
            with contextlib.suppress(TimeoutError, ConnectionError):
                while part := conn.recv(65536):
                    got += part
                    conn.settimeout(0.3)
            return got

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """The exit status, and the seconds that it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(10), time.monotonic() - began

    def errors(self) -> str:
        """What the web process has written to its log."""
        self._log.flush()
        return Path(self._log.name).read_text()


def eventually(check: Callable[[], bool], within_s: float = 5) -> None:
    """Wait until `check` is true."""
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, f"not true within {within_s} s"
        time.sleep(0.01)


def sample_snapshot(now: float | None = None) -> dict[str, Any]:
    """A snapshot as a real instance has it."""
    now = time.time() if now is None else now
    since = now - 11_532

    def process(name: str, kind: str, **more: Any) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "name": name, "kind": kind, "group": None, "pid": 4711, "state": "RUNNING",
            "since": since, "cpu_percent": 0.4, "rss_bytes": 38 * 2**20,
            "private_bytes": 9 * 2**20, "restarts": 0, "partitions": [], "last_exit": None,
            "retry_in_s": None, "strays": [],
        }  # fmt: skip
        return fields | more

    counts = [
        process(
            f"count_words#{slot}", "agent", group="count_words", pid=4717 + slot,
            cpu_percent=21.4 + slot, partitions=[2 * slot, 2 * slot + 1],
            rss_bytes=(61 + slot) * 2**20,
        )
        for slot in range(3)
    ]  # fmt: skip
    broken = process(
        "count_words#3", "agent", group="count_words", pid=None, state="BACKOFF",
        cpu_percent=None, rss_bytes=None, private_bytes=None, restarts=3, partitions=[],
        last_exit="killed by SIGKILL 12 s ago (out of memory)", retry_in_s=4.0,
    )  # fmt: skip
    return {
        "schema": "streamd.status/1", "name": "proj", "app": "proj", "state": "degraded",
        "sentence": "1 of 4 count_words processes restarts; 1 485 events behind.",
        "pid": 4711, "guardian_pid": 4710, "mode": "start", "since": since,
        "web": "http://127.0.0.1:6066", "broker": "embedded", "datadir": "data",
        "version": "0.1.0",
        "problems": [{
            "process": "count_words#3", "code": "backoff",
            "text": "was killed by SIGKILL 12 s ago (out of memory?); next try in 4 s (3 of 5)",
            "remedy": "streamd logs count_words#3",
        }],
        "rate": 154_830.4, "behind": 1485, "events": 1_786_204_118, "errors": 2, "retries": 2,
        "dead_letters": 1, "checkpoint_ms": 8.2, "wal_bytes": 4_300_000,
        "processes": [
            process("guardian", "guardian", pid=4710, rss_bytes=9 * 2**20, cpu_percent=0.0),
            process("master", "master", cpu_percent=0.9),
            process("zygote", "zygote", pid=4712, cpu_percent=0.0),
            process("log", "log", pid=4713, cpu_percent=3.1),
            process("web", "web", pid=4714, cpu_percent=1.1, since=now - 75),
            process("app#0", "agent", group="app", pid=4715),
            process("shuffle_words#0", "agent", group="shuffle_words", pid=4716,
                    cpu_percent=88.0, partitions=[0, 1, 2, 3, 4, 5, 6, 7],
                    strays=[5120, 5121]),
            *counts, broken,
        ],
        "agents": [
            {"name": "proj.shuffle_words", "label": "shuffle_words", "group": "shuffle_words",
             "topics": ["proj-posts"], "sends": ["proj-proj.count_words"], "rate": 1548.3,
             "events": 17_862_041, "behind": 0, "concurrency": 1},
            {"name": "proj.count_words", "label": "count_words", "group": "count_words",
             "topics": ["proj-proj.count_words"], "rate": 153_282.0, "events": 1_768_342_077,
             "behind": 1485, "concurrency": 1},
        ],
        "tables": [{"name": "word_counts", "group": "count_words", "keys": 41_203,
                    "partitions": 8, "help": "How often each word came"}],
        "history": [
            {"t": now - 120 + at, "behind": 1000 + (at * 37) % 700 + (at > 90) * 8 * at,
             "rate": 150_000 + 9000 * ((at * 7919) % 13 - 6) / 6 - 80_000 * (88 < at < 95)}
            for at in range(120)
        ],
        "events_log": [
            {"t": now - 300, "level": "INFO", "text": "count_words#2 is RUNNING after 0.03 s"},
            {"t": now - 200, "level": "INFO", "text": "dead letter: proj-posts[3]@1042"},
            {"t": now - 12, "level": "WARNING", "text": "count_words#3 was killed by SIGKILL; "
             "next try in 4 s"},
        ],
    }  # fmt: skip


@contextlib.contextmanager
def fleet(**given: Any) -> Iterator[WebFleet]:
    with WebFleet(**given) as running:
        yield running
