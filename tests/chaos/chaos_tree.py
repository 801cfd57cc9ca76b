"""An instance under load and under attack, and what must be true of it in the end.

The oracle is a replay of the input that the log holds, compared key by key: a conserved sum
would not see a lost or doubled event. Nothing is asked of the instance: it is all read from
the log's file.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import streamd
from streamd.agentproc.broker.reader import Reader
from streamd.agentproc.broker.turnstile import Turnstile
from streamd.agentproc.broker.writer import Writer
from streamd.errors import StreamdError
from streamd.failpoints import fired_path
from streamd.instance import Folder, process_state
from streamd.link import connect
from streamd.supervisor import tree
from streamd.tables import SCATTERED_MARK
from streamd.wire import Append, Appended, Command, Document, OutRecord

ROOT = Path(streamd.__file__).parent.parent
APP = Path(__file__).with_name("chaos_app.py")
WORDS = [f"w{number}" for number in range(60)]
DRAIN_S = 60.0

Row = dict[str, Any]


def eventually(is_so: Callable[[], Any], what: str, within_s: float = 15.0) -> Any:
    """Wait until the condition gives something true, and return that."""
    deadline = time.monotonic() + within_s
    while not (result := is_so()):
        assert time.monotonic() < deadline, f"{what}: not so after {within_s} s"
        time.sleep(0.01)
    return result


class Tree:
    """One instance, started and stopped by its command line."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.datadir = place / "data"
        self.logfile = place / "log.txt"
        self.folder = Folder(place / "run" / "proj")
        self.trees: list[str] = []  # every value of STREAMD_TREE that there was
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "STREAMD_RUNTIME_DIR": str(place / "run"),
        }
        (place / "proj.py").write_text(APP.read_text())
        self._worker: subprocess.Popen[bytes] | None = None

    def command(self, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run `streamd WORDS`."""
        return subprocess.run(
            [sys.executable, "-m", "streamd", "-A", "proj", *words],
            cwd=self.place, env=self.environment | environment, capture_output=True,
            text=True, timeout=90, check=False,
        )  # fmt: skip

    def start(self, mode: str = "start", **environment: str) -> int:
        """Start with a process for each group, or as `worker`; the exit code of the start."""
        options = ("-p", "0", "--datadir", str(self.datadir), "-f", str(self.logfile))
        if mode == "start":
            done = self.command("start", *options, **environment)
            code, said = done.returncode, done.stdout + done.stderr
        else:
            before = self.folder.read_record()
            with (self.place / "worker.txt").open("ab") as out:
                self._worker = subprocess.Popen(
                    [sys.executable, "-m", "streamd", "-A", "proj", "worker", *options],
                    cwd=self.place, env=self.environment | environment,
                    stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                )  # fmt: skip
            eventually(lambda: self.folder.read_record() not in (None, before), "worker starts")
            eventually(lambda: self.state() == "running", "worker runs", 30.0)
            code, said = 0, ""
        record = self.folder.read_record()
        if record is not None and record.tree not in self.trees:
            self.trees.append(record.tree)
        assert not code or environment, f"start: exit code {code}\n{said}"
        return code

    def stop(self, *words: str) -> None:
        """Stop; nothing may be left."""
        done = self.command("stop", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        self.assert_nothing_left()

    def ask(self, verb: str) -> Any:
        """What the master answers; None when there is none."""

        async def go() -> Any:
            link = await connect(self.folder.control_path, "master")
            try:
                answer = await link.request(Command(verb), 5.0)
            finally:
                link.close()
            return answer.data if isinstance(answer, Document) else None

        try:
            return asyncio.run(go())
        except StreamdError:
            return None

    def state(self) -> str:
        """The state of the instance, "" when there is none."""
        return str((self.ask("status") or {}).get("state", ""))

    def processes(self) -> dict[str, int]:
        """Name → pid of what is alive."""
        status = self.ask("status") or {"processes": []}
        return {each["name"]: each["pid"] for each in status["processes"] if each["pid"]}

    def kill_one_agent(self) -> None:
        """Kill one agent process."""
        pids = self.processes()
        kill(next(pid for name, pid in pids.items() if "#" in name))

    def census(self) -> list[tree.Found]:
        """Every process of any tree that was started here."""
        markers = [b"STREAMD_TREE=" + marker.encode() for marker in self.trees]
        found = []
        for each in tree.everything():
            with contextlib.suppress(OSError):
                content = Path(f"/proc/{each.pid}/environ").read_bytes()
                if any(marker in content for marker in markers) and each.state not in "ZX":
                    found.append(each)
        return found

    def zombies(self) -> list[tree.Found]:
        """Ended children of the tree's processes that nobody has reaped."""
        parents = {each.pid for each in self.census()}
        return [e for e in tree.everything() if e.state == "Z" and e.ppid in parents]

    def assert_nothing_left(self, within_s: float = 3.0) -> None:
        """No process has the tree's marker, and its lock is free."""
        self.reap()
        eventually(lambda: not self.census(), "nothing is left of the tree", within_s)
        if self._worker is not None:
            self._worker.wait(3.0)
            self._worker = None
        # A process that is just ending may hold the lock a moment longer than its memory.
        eventually(lambda: tree.is_free(self.folder.lock_path), "the lock is free", within_s)

    def reap(self) -> None:
        """Wait for what was adopted: this process is a subreaper, see `subreaper`."""
        if self._worker is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._worker.wait(0.0)
        for pid in tree.children():
            if tree_state(pid) == "Z" and (self._worker is None or pid != self._worker.pid):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    def fired(self, name: str) -> bool:
        """True once a failpoint has acted."""
        files = (Path(fired_path(marker, name)).name for marker in self.trees)
        return any((self.place / "run" / file).exists() for file in files)

    def kill_all(self) -> None:
        """End whatever is left; for the end of a test that failed."""
        if self.folder.lock_path.exists():
            for marker in self.trees:
                record = self.folder.read_record()
                tree.kill_tree(marker, record, self.folder.lock_path, deadline_s=3.0)
        if self._worker is not None:
            self._worker.wait(3.0)
        self.reap()


def tree_state(pid: int) -> str:
    """The state of a process, "" when it is gone."""
    try:
        return process_state(pid)
    except ProcessLookupError:
        return ""


@contextmanager
def instance() -> Iterator[Tree]:
    """An instance that is not started; ended and removed afterwards."""
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans of killed trees come here
    with tempfile.TemporaryDirectory(prefix="sc-") as folder:
        made = Tree(Path(folder))
        try:
            yield made
        except BaseException:
            keep_log(made)
            raise
        finally:
            made.kill_all()
            libc.prctl(36, 0, 0, 0, 0)


def keep_log(made: Tree) -> None:
    """Print the end of the log of a test that failed, and keep its data where asked to."""
    if made.logfile.exists():
        lines = made.logfile.read_text(errors="replace").splitlines()
        sys.stdout.write("\n".join([*lines[-200:], ""]))
    if kept := os.environ.get("CHAOS_KEEP"):
        subprocess.run(["cp", "-r", str(made.place), kept], check=False)


# Load.


class Load:
    """Sends posts, transfers and deposits through the log's socket until told to stop.

    A batch whose acknowledgement did not come is not sent again: it is in the log once or not
    at all, and the oracle takes what the log has.
    """

    def __init__(self, made: Tree, seed: int, pause_s: float = 0.02) -> None:
        self.acked: set[tuple[str, int]] = set()  # (topic, number)
        self.batches = 0
        self._made = made
        self._chance = random.Random(seed)
        self._pause_s = pause_s
        self._number = 0
        self._hows: list[str] = []  # what is to go wrong with the next transfers
        self._ending = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            asyncio.run(self._send())
        except BaseException as error:
            self._error = error

    async def _send(self) -> None:
        while not self._ending.is_set():
            try:
                link = await connect(self._made.folder.log_path, "log")
            except StreamdError:
                await asyncio.sleep(0.02)
                continue
            try:
                while not self._ending.is_set():
                    batch = self.batch()
                    answer = await link.request(Append(batch), 30.0)
                    assert isinstance(answer, Appended)
                    self.acked |= {number_of(record) for record in batch}
                    self.batches += 1
                    await asyncio.sleep(self._pause_s)
            except StreamdError:
                continue
            finally:
                link.close()

    def spoil(self, how: str) -> None:
        """Let one of the next transfers go wrong in this way."""
        self._hows.append(how)

    def batch(self) -> list[OutRecord]:
        """Some records of each kind; each has a number of its own."""
        chance, records = self._chance, []
        for _ in range(6):
            post = " ".join(chance.choices(WORDS, k=6))
            records.append(self._record("posts", json.dumps(post)))
        for _ in range(6):
            partition = chance.randrange(2)
            source, target = (f"{partition}-{n}" for n in chance.sample(range(8), 2))
            how = chance.choices(["", "once", "always"], [400, 3, 1])[0]
            if not how and self._hows:
                how = self._hows.pop()
            value = {
                "number": self._number, "source": source, "target": target,
                "amount": chance.randrange(1, 60), "how": how,
            }  # fmt: skip
            records.append(self._record("transfers", json.dumps(value), partition))
        for _ in range(4):
            key = f"d{chance.randrange(20)}"
            record = self._record("deposits", str(chance.randrange(9)))
            record.key = key.encode()
            records.append(record)
        return records

    def _record(self, topic: str, value: str, partition: int = -1) -> OutRecord:
        self._number += 1
        headers = [("number", b"%d" % (self._number - 1))]
        return OutRecord(topic, None, value.encode(), partition, headers=headers)


def number_of(record: OutRecord) -> tuple[str, int]:
    """Topic and number of a record that `Load` made."""
    return record.topic, int(dict(record.headers)["number"])


# What the log holds.


class Content:
    """The topics, tables and positions of an instance's log."""

    def __init__(self, datadir: Path) -> None:
        self._turnstile = Turnstile(datadir)
        self.reader = Reader(datadir, self._turnstile)

    def close(self) -> None:
        self.reader.close()
        self._turnstile.close()

    def behind(self) -> dict[str, int]:
        """Events that an agent has not settled, by agent and topic; only those behind."""
        rows = self.reader.db.execute(
            "SELECT reading.agent, topics.name, sum(heads.next - coalesce((SELECT position"
            " FROM positions JOIN agents ON agents.id = positions.agent"
            " WHERE agents.name = reading.agent AND positions.tp = heads.tp), 0))"
            " FROM reading JOIN topics ON topics.name = reading.topic"
            " JOIN heads ON heads.tp >= first_tp AND heads.tp < first_tp + partitions"
            " GROUP BY 1, 2"
        )
        return {f"{agent} {topic}": behind for agent, topic, behind in rows if behind}

    def topic(self, name: str) -> list[list[Row]]:
        """Every event of a topic, by partition, in order."""
        self.reader.catalog.load(self.reader.db)
        if name not in self.reader.catalog.topics:
            return []
        return [self._partition(name, p) for p in range(self._partitions(name))]

    def _partitions(self, name: str) -> int:
        return int(self.reader.catalog.topics[name].partitions)

    def _partition(self, name: str, partition: int) -> list[Row]:
        rows: list[Row] = []
        position = 0
        while batch := self.reader.fetch(name, partition, position, 10_000, 1 << 24):
            headers = batch.headers or [[]] * len(batch.values)
            for key, value, header in zip(batch.keys, batch.values, headers, strict=True):
                rows.append(
                    {
                        "key": (key or b"").decode(),
                        "value": json.loads(value or b"null"),
                        "headers": dict(header),
                    }
                )
            position = batch.end
        return rows

    def table(self, name: str, partitions: int) -> dict[tuple[int, str], Any]:
        """Every row of a table: (partition, key) → value."""
        return {
            (partition, json.loads(key)): json.loads(value)
            for partition in range(partitions)
            for key, value in self.reader.rows(name, partition, after=None, limit=1_000_000)
            if key != SCATTERED_MARK
        }


def drain(made: Tree) -> None:
    """Wait until every agent has settled all that the log holds, and nothing is a zombie."""
    content = Content(made.datadir)
    try:
        deadline = time.monotonic() + DRAIN_S
        while behind := content.behind():
            status = made.ask("status") or {}
            assert time.monotonic() < deadline, (
                f"still behind after {DRAIN_S} s: {behind}; {status.get('sentence')} "
                f"{[(p['name'], p['state']) for p in status.get('processes', [])]}"
            )
            time.sleep(0.05)
    finally:
        content.close()
    eventually(lambda: not made.zombies(), "no zombies", 3.0)


# The oracle.


def problems(made: Tree, acked: set[tuple[str, int]]) -> list[str]:
    """What is wrong with the end state; empty when all is exact. The instance is stopped."""
    content = Content(made.datadir)
    try:
        found = [
            *_input_problems(content, acked),
            *_word_problems(content),
            *_bank_problems(content),
            *_tick_problems(content),
        ]
    finally:
        content.close()
    writer = Writer(made.datadir, 4)
    if (answer := writer.db.execute("PRAGMA integrity_check").fetchall()) != [("ok",)]:
        found.append(f"integrity_check: {answer[:3]}")
    writer.close()
    return found


def _input_problems(content: Content, acked: set[tuple[str, int]]) -> Iterator[str]:
    there = Counter(
        (topic, int(row["headers"]["number"]))
        for topic in ("posts", "transfers", "deposits")
        for rows in content.topic(topic)
        for row in rows
    )
    if lost := acked - set(there):
        yield f"{len(lost)} acknowledged records are not in the log: {sorted(lost)[:5]}"
    if twice := [number for number, count in there.items() if count > 1]:
        yield f"{len(twice)} records are in the log more than once: {twice[:5]}"


def _word_problems(content: Content) -> Iterator[str]:
    wanted: Counter[str] = Counter()
    for rows in content.topic("posts"):
        for row in rows:
            wanted.update(row["value"].split())
    counted: Counter[str] = Counter()
    for (_, word), count in content.table("word_counts", 4).items():
        counted[word] += count
    yield from _differences("word_counts", dict(wanted), dict(counted))
    seen: dict[str, list[int]] = defaultdict(list)
    for rows in content.topic("results"):
        for row in rows:
            seen[row["key"]].append(row["value"])
    wrong = [
        word
        for word in sorted(wanted.keys() | seen.keys())
        if seen[word] != list(range(1, wanted[word] + 1))
    ]
    for word in wrong[:5]:
        yield f"results of {word}: {_first_break(seen[word])}, {wanted[word]} wanted"


def _bank_problems(content: Content) -> Iterator[str]:
    accounts: dict[tuple[int, str], int] = {}
    ledger: dict[str, list[Row]] = defaultdict(list)
    refused: Counter[int] = Counter()
    for partition, rows in enumerate(content.topic("transfers")):
        for row in rows:
            transfer = row["value"]
            if transfer.get("how") in ("always", "exit", "segfault"):
                refused[transfer["number"]] += 1
                continue
            source, target = (partition, transfer["source"]), (partition, transfer["target"])
            done = accounts.get(source, 100) >= transfer["amount"]
            if done:
                accounts[source] = accounts.get(source, 100) - transfer["amount"]
            balance = accounts.get(source, 100)
            ledger[transfer["source"]].append(
                {"number": transfer["number"], "done": done, "balance": balance}
            )
            if done:
                accounts[target] = accounts.get(target, 100) + transfer["amount"]
    yield from _differences("accounts", accounts, content.table("accounts", 2))
    written: dict[str, list[Row]] = defaultdict(list)
    for rows in content.topic("ledger"):
        for row in rows:
            written[row["key"]].append(row["value"])
    yield from _differences("ledger", dict(ledger), dict(written))
    letters = Counter(
        row["value"]["number"] for rows in content.topic("proj-dead-letters") for row in rows
    )
    yield from _differences("dead letters", dict(refused), dict(letters))
    sums: dict[str, int] = defaultdict(int)
    for rows in content.topic("deposits"):
        for row in rows:
            sums[row["key"]] += row["value"]
    held: dict[str, int] = defaultdict(int)
    for (_, key), value in content.table("deposited", 2).items():
        held[key] += value
    ticks = held.pop("ticks", 0)
    logged = [row["value"] for rows in content.topic("tick_log") for row in rows]
    if logged != list(range(1, ticks + 1)):
        yield f"ticks: {ticks} in the table; the log has {_first_break(logged)}"
    yield from _differences("deposited", dict(sums), dict(held))


def _tick_problems(content: Content) -> Iterator[str]:
    if not any(content.topic("tick_log")):
        yield "no tick was logged"


def _first_break(numbers: list[int]) -> str:
    for index, number in enumerate(numbers):
        if number != index + 1:
            around = numbers[max(0, index - 3) : index + 4]
            return f"{len(numbers)} values, {number} where {index + 1} belongs: … {around}"
    return f"{len(numbers)} values without a break"


def _differences(what: str, wanted: dict[Any, Any], got: dict[Any, Any]) -> Iterator[str]:
    wrong = [key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)]
    for key in sorted(wrong, key=str)[:5]:
        left, right = wanted.get(key), got.get(key)
        if isinstance(left, list) and isinstance(right, list):
            at = next(
                (
                    i
                    for i, pair in enumerate(zip(left, right, strict=False))
                    if pair[0] != pair[1]
                ),
                min(len(left), len(right)),
            )
            yield (
                f"{what} of {key}: {len(left)} wanted, {len(right)} there; from {at} on "
                f"{left[at : at + 3]} wanted, {right[at : at + 3]} there"
            )
        else:
            yield f"{what} of {key}: {left!r} wanted, {right!r} there"
    if len(wrong) > 5:
        yield f"{what}: {len(wrong)} keys differ"


def complaints(made: Tree) -> list[str]:
    """Lines of the log that tell of what nobody here did."""
    lines = made.logfile.read_text(errors="replace").splitlines()
    found = [line for line in lines if "is FATAL" in line or " hangs:" in line]
    found = [line for line in found if "it was stopped by a signal" not in line]
    for index, line in enumerate(lines):
        if "Traceback (most recent call last)" in line:
            ends = (each for each in lines[index + 1 :] if not each.startswith("      "))
            if "Planned" not in (end := next(ends, "")):
                found.append(f"{lines[index - 1]} … {end}")
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Signal a process; False when it was gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
