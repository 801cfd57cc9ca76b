"""New code takes the place of the code that runs, or nothing is touched and the reason told."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from supervisor_load import COUNT, WORDS, Feed, pids, wait_counted
from supervisor_tree import ROOT, Tree, eventually, tree_of

from streamd.errors import StreamdError

EIGHT = COUNT.replace("@app.agent(lines)", "@app.agent(lines, processes=3)").replace(
    "processes=3)\nasync def count", "processes=4)\nasync def count"
)


def write(house: Tree, source: str) -> None:
    """Put new code where the app is, of a later second: Python's cache goes by seconds."""
    path = house.place / "proj.py"
    later = path.stat().st_mtime + 2
    path.write_text(source)
    os.utime(path, (later, later))


def keys(house: Tree) -> dict[str, int]:
    """How many keys each table has."""
    return {table["name"]: table["keys"] for table in house.ask("status")["tables"]}


def refused(house: Tree, verb: str = "reload", **args: object) -> StreamdError:
    """Why a command was refused."""
    with pytest.raises(StreamdError) as caught:
        house.ask_all(verb, **args)
    return caught.value


class States:
    """Looks all the time, in `with`, how many agent processes run and what the state is."""

    def __init__(self, house: Tree) -> None:
        self.fewest = 99
        self.seen: set[str] = set()
        self.sentences: set[str] = set()
        self._house = house
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "States":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            status = self._house.ask("status")
            agents = [row for row in status["processes"] if row["kind"] == "agent"]
            running = sum(row["state"] == "RUNNING" for row in agents)
            self.fewest = min(self.fewest, running)
            self.seen.add(status["state"])
            self.sentences.add(status["sentence"])


@contextmanager
def systemd(house: Tree) -> Iterator[socket.socket]:
    """A socket that hears what systemd would."""
    path = house.place / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(path))
        heard.setblocking(False)
        yield heard


def messages(heard: socket.socket) -> list[str]:
    """What came since the last call, without the state that is told each second."""
    found: list[str] = []
    while True:
        try:
            text = heard.recv(4096).decode()
        except BlockingIOError:
            return found
        found += [line for line in text.splitlines() if line.partition("=")[0] in
                  ("READY", "RELOADING", "STOPPING", "MONOTONIC_USEC")]  # fmt: skip


def test_under_load_every_process_is_exchanged_one_at_a_time_and_the_counts_are_exact() -> None:
    with tree_of(EIGHT) as house:
        before = pids(house.run())
        assert len(before) == 8
        write(house, EIGHT + "\nprint('new code')\n")

        with Feed(house) as feed:
            eventually(lambda: feed.sent.total() > 200, 20)
            with States(house) as states:
                told = house.ask_all("reload")
            eventually(lambda: feed.sent.total() > 1500, 20)

        wait_counted(house, feed.sent)
        after = pids(house)
        assert told[-1] == {"reloaded": "8 processes run the new code"}
        assert after.keys() == before.keys()
        assert not set(after.values()) & set(before.values())
        assert states.fewest >= 7
        assert states.seen == {"running", "reloading"}
        assert "Reloading: 3 of 8 processes run the new code." in states.sentences
        assert house.log.count("new code\n") >= 1
        assert [row["name"] for row in house.ask("ps") if row["kind"] == "zygote"] == ["zygote"]


def test_an_import_that_fails_touches_nothing_and_says_why() -> None:
    with tree_of(COUNT) as house, systemd(house) as heard:
        address = str(house.place / "notify")
        house.start(environment={"NOTIFY_SOCKET": address})
        assert "ready" in house.wait_ready()
        before = pids(house)
        eventually(lambda: "READY=1" in messages(heard))
        write(house, COUNT + "\nimport no_such_module\n")

        error = refused(house)

        assert "cannot be imported" in str(error) and "no_such_module" in str(error)
        assert error.exit_code == 78
        assert pids(house) == before
        told = messages(heard)
        assert told[0] == "RELOADING=1" and told[-1] == "READY=1"
        assert told[1].startswith("MONOTONIC_USEC=")
        assert any("no_such_module" in event["text"] for event in house.ask("events"))
        assert "zygote-new" not in {row["name"] for row in house.ask("ps")}
        assert house.ask("status")["state"] == "running"


MINE = """
from streamd.codecs import Codec
class Mine(Codec):
    def _dumps(self, value):
        return str(value).encode()
    def _loads(self, data):
        READ
counts = app.Table("counts", default=int, key_type=str, value_serializer=Mine(name="mine"))
"""


def with_codec(read: str) -> str:
    lines = COUNT.splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("counts ="))
    return "".join([*lines[:at], MINE.replace("READ", read), *lines[at + 1 :]])


def test_a_canary_that_fails_touches_nothing_and_says_why() -> None:
    with tree_of(with_codec("return int(data)")) as house:
        before = pids(house.run())
        with Feed(house) as feed:
            eventually(lambda: feed.sent.total() > 100, 20)
        eventually(lambda: keys(house)["counts"] == len(WORDS))
        write(house, with_codec("raise ValueError('not mine')"))

        error = refused(house)

        assert "the canary of the new code failed: table 'counts' holds rows" in str(error)
        assert "nothing was touched" in str(error) and error.exit_code == 78
        assert pids(house) == before
        assert house.ask("status")["state"] == "running"


def test_a_change_that_cannot_run_beside_the_old_is_refused_by_name() -> None:
    with tree_of(COUNT) as house:
        before = pids(house.run())
        write(house, COUNT.replace('"words", value_type=str, partitions=4',
                                   '"words", value_type=str, partitions=8'))  # fmt: skip

        error = refused(house)

        assert "topic 'words': partitions was 4 and is 8" in str(error)
        assert error.remedy == "streamd stop, then streamd start"
        assert pids(house) == before


def test_code_that_fails_later_is_put_back_and_nothing_is_lost_or_done_twice() -> None:
    with tree_of(COUNT) as house:
        before = pids(house.run())
        new = COUNT.replace("processes=3", "processes=4")
        # The sinks, which are exchanged first, are well: the source dies at its first line.
        write(
            house,
            new.replace(
                "for word in line", "__import__('os')._exit(9)\n        for word in line"
            ),
        )

        with Feed(house) as feed:
            eventually(lambda: feed.sent.total() > 100, 20)
            error = refused(house)
            sent = feed.sent.total()
            eventually(lambda: feed.sent.total() > sent + 500, 20)

        assert "the reload failed: split#0 is" in str(error)
        assert "the old code runs again" in str(error)
        wait_counted(house, feed.sent)
        after = pids(house)
        assert after.keys() == before.keys()
        assert after["app#0"] == before["app#0"]
        assert house.ask("status")["state"] == "running"
        assert any("the old code runs again" in event["text"] for event in house.ask("events"))


PAGE = """
@app.page('/old/')
async def old(self, request):
    return self.text('the old page')
"""

NEW_PAGE = """
@app.page('/new/')
async def new(self, request):
    return self.text('the new page')
"""

TOTAL = """
totals = app.Table('totals', default=int)
@app.agent(lines)
async def total(stream):
    async for line in stream:
        totals['lines'] += 1
"""


def test_what_is_new_is_started_and_what_is_gone_is_drained() -> None:
    fewer = COUNT.replace("processes=3", "processes=2")
    with tree_of(COUNT + PAGE) as house:
        web = house.run(option_web_enabled="true").last["web"]
        # The old page's place in the module is another now.
        write(house, fewer + NEW_PAGE + PAGE + TOTAL)

        with Pages(f"{web}/old/") as pages:
            told = [line.get("doing") for line in house.ask_all("reload")]

        assert "new: group total" in told and "new: page /new/" in told
        assert "count: 3 -> 2 processes" in told
        assert set(pids(house)) == {"split#0", "count#0", "count#1", "total#0", "app#0"}
        assert pages.bodies == {b"the old page"} and pages.errors <= {503}
        assert urllib.request.urlopen(f"{web}/new/", timeout=5).read() == b"the new page"
        with Feed(house) as feed:
            eventually(lambda: feed.sent.total() > 100, 20)
        eventually(lambda: keys(house).get("totals"))

        write(house, fewer)
        told = [line.get("doing") for line in house.ask_all("reload")]

        assert "gone: group total" in told and "total is drained and ends" in told
        assert "total#0" not in {row["name"] for row in house.ask("ps")}
        wait_counted(house, feed.sent)


class Pages:
    """Asks for a page all the time, in `with`."""

    def __init__(self, url: str) -> None:
        self.bodies: set[bytes] = set()
        self.errors: set[int] = set()
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Pages":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with urllib.request.urlopen(self._url, timeout=5) as reply:
                    self.bodies.add(reply.read())
            except urllib.error.HTTPError as error:
                self.errors.add(error.code)
                error.close()


def test_reloads_that_come_together_are_done_once_more_and_none_while_it_stops() -> None:
    # Each line is another one: the same one again would only be counted.
    slow = COUNT + "\nimport time; print('imported_at', time.time_ns()); time.sleep(1.5)\n"
    with tree_of(slow) as house:
        house.run()

        for _ in range(4):
            house.signal(signal.SIGHUP)
            eventually(lambda: house.ask("status")["state"] == "reloading")
        eventually(lambda: house.ask("status")["state"] == "running", 40)

        # The start's, the first reload's, and that of all which came meanwhile.
        assert house.log.count("imported_at ") == 3
        assert "another reload was asked for while this one waits: both are one" in house.log
        house.signal(signal.SIGHUP)
        eventually(lambda: house.log.count("imported_at ") == 4, 20)
        house.signal(signal.SIGTERM)
        house.signal(signal.SIGHUP)
        assert house.wait_exit() == 0
        assert house.log.count("imported_at ") == 4


def test_a_reload_is_the_cure_for_a_zygote_that_found_other_code() -> None:
    with tree_of(COUNT) as house:
        before = pids(house.run())
        write(house, COUNT + "\nmore = app.topic('more', partitions=2)\n")
        os.kill(house.pid("zygote"), signal.SIGKILL)
        eventually(lambda: house.process("zygote")["state"] == "FATAL")
        assert house.ask("status")["problems"][0]["remedy"] == "streamd reload runs the new one"
        os.kill(before["count#1"], signal.SIGKILL)

        assert house.ask_all("reload")[-1] == {"reloaded": "5 processes run the new code"}

        assert house.process("zygote")["state"] == "RUNNING"
        assert not set(pids(house).values()) & set(before.values())


def test_a_worker_reloads_its_one_process() -> None:
    with tree_of(COUNT) as house:
        before = pids(house.run(mode="worker"))
        with Feed(house) as feed:
            eventually(lambda: feed.sent.total() > 100, 20)
            assert house.ask_all("reload")[-1] == {"reloaded": "1 process runs the new code"}

        wait_counted(house, feed.sent)
        assert list(before) == ["app#0"] and pids(house) != before


SLOW_END = """
import asyncio, signal
@app.task
async def linger():
    try:
        await asyncio.sleep(600)
    finally:
        print("lingers")
        await asyncio.sleep(600)
"""


def test_a_new_zygote_that_is_killed_midway_is_no_loss() -> None:
    with tree_of(COUNT + SLOW_END) as house:
        before = pids(house.run(option_grace="1s"))

        with Feed(house) as feed:
            error = asyncio.run(killed_midway(house, "zygote-new"))
            eventually(lambda: feed.sent.total() > 500, 20)

        assert "could not be forked: zygote-new has ended" in str(error)
        assert "the old code runs again" in str(error)
        wait_counted(house, feed.sent)
        assert pids(house).keys() == before.keys()


async def killed_midway(house: Tree, name: str) -> StreamdError | None:
    """Kill a process once the last process is being exchanged; how the reload ends."""
    asked = asyncio.create_task(asyncio.to_thread(house.ask_all, "reload"))
    await asyncio.to_thread(eventually, lambda: "4 of 5 processes" in house.log)
    os.kill(await asyncio.to_thread(house.pid, name), signal.SIGKILL)
    try:
        await asked
    except StreamdError as error:
        return error
    return None


def test_an_old_zygote_that_is_killed_midway_changes_nothing() -> None:
    with tree_of(COUNT + SLOW_END) as house:
        before = pids(house.run(option_grace="1s"))

        assert asyncio.run(killed_midway(house, "zygote")) is None

        after = pids(house)
        assert after.keys() == before.keys()
        assert not set(after.values()) & set(before.values())
        assert house.process("zygote")["state"] == "RUNNING"


def test_a_reload_is_given_up_when_the_instance_stops() -> None:
    with tree_of(COUNT + "\nimport time, pathlib\n"
                 "if pathlib.Path('seen').exists(): print('slow'); time.sleep(600)\n"
                 "pathlib.Path('seen').touch()\n") as house:  # fmt: skip
        house.run()
        house.signal(signal.SIGHUP)
        eventually(lambda: "slow" in house.log)

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0
        house.wait_nothing_left(1.0)


def test_the_command_tells_what_changed_and_ends_with_78_when_refused() -> None:
    with tree_of(COUNT) as house:
        house.run()
        write(house, COUNT + "\n@app.timer(60)\nasync def tick():\n    print('tick')\n")

        done = streamd(house, "reload")

        assert done.returncode == 0, done.stderr
        assert "new: timer tick" in done.stderr
        assert done.stdout.startswith("Reloaded proj in ")
        write(house, "def broken(:\n")
        done = streamd(house, "reload")
        assert done.returncode == 78 and done.stdout == ""
        assert "Error: the new code cannot be imported" in done.stderr


def streamd(house: Tree, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the command line against the instance."""
    return subprocess.run(
        [sys.executable, "-m", "streamd", "--name", "proj", *args],
        cwd=house.place,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "STREAMD_RUNTIME_DIR": str(house.place / "run"),
        },
        capture_output=True,
        text=True,
        timeout=30,
    )
