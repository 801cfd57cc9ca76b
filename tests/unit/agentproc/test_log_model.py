"""The embedded log against a list, and its parts against their words."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.agentproc.broker import TP, Checkpoint, Output, Subscription
from streamd.agentproc.broker.bell import listen
from streamd.agentproc.broker.condition import check_log, refuse_network_folder
from streamd.agentproc.broker.pack import (
    MAX_PACK_BYTES,
    MAX_PACK_EVENTS,
    decode_pack,
    encode_packs,
    is_sound,
    seal,
)
from streamd.agentproc.broker.placing import Placing, placed
from streamd.agentproc.broker.reader import Reader
from streamd.agentproc.broker.retention import trim_step
from streamd.agentproc.broker.schema import FORMAT, OFFSET_BITS, log_path, query
from streamd.agentproc.broker.turnstile import Turnstile
from streamd.agentproc.broker.wal import Checkpointer
from streamd.agentproc.broker.watermark import Watermark
from streamd.agentproc.broker.writer import Writer
from streamd.errors import BrokerError, ConfigError, LogDamaged, NotPermitted, UsageError
from streamd.failpoints import FAILPOINTS, FailpointError, arm, failpoint
from streamd.partition import partition_for
from streamd.wire import AgentInfo, GroupInfo, OutRecord, TopicInfo

T0 = TP("t", 0)
WEEK_S = 7 * 24 * 3600.0
GROUP = [GroupInfo("g", [AgentInfo("reader", "reader", ["t"], 1, "retry", "")], [], 1, "")]

keys = st.none() | st.binary(max_size=4)
headers = st.lists(st.tuples(st.text(max_size=3), st.binary(max_size=3)), max_size=2)
events = st.tuples(keys, keys, st.floats(0, 2e9), headers)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    opened = Writer(tmp_path, default_partitions=2)
    opened.make_topic("t")
    yield opened
    opened.close()


@pytest.fixture
def reader(tmp_path: Path, writer: Writer) -> Iterator[Reader]:
    opened = Reader(tmp_path, writer.turnstile)
    yield opened
    opened.close()


def output(*values: bytes | None, tp: TP = T0, at: float = 1.0) -> Output:
    return Output(tp, [None] * len(values), list(values), [at] * len(values))


# Packs.


@given(st.lists(events, min_size=1, max_size=30))
def test_a_pack_gives_back_what_was_put_in(rows: list[tuple[object, ...]]) -> None:
    columns = [list(column) for column in zip(*rows, strict=True)]
    given = Output(T0, *columns)

    (pack,) = encode_packs(given)
    had_keys, values, timestamps, had_headers = decode_pack(pack.data, pack.events)

    assert (had_keys, values, timestamps) == (given.keys, given.values, given.timestamps)
    assert (had_headers or [[] for _ in rows]) == given.headers


@given(st.lists(st.integers(0, 90_000), min_size=1, max_size=40), st.integers(1, 2300))
@settings(max_examples=30, deadline=None)
def test_packs_are_bounded_and_keep_the_order(sizes: list[int], small: int) -> None:
    values: list[bytes | None] = [*(bytes(size) for size in sizes), *[b"s"] * small]

    packs = encode_packs(output(*values))

    assert [value for p in packs for value in decode_pack(p.data, p.events)[1]] == values
    assert all(pack.events <= MAX_PACK_EVENTS for pack in packs)
    assert all(len(pack.data) <= MAX_PACK_BYTES or pack.events == 1 for pack in packs)


def test_a_single_event_may_be_larger_than_a_pack() -> None:
    packs = encode_packs(output(b"a", bytes(2 * MAX_PACK_BYTES), b"b"))

    assert [pack.events for pack in packs] == [1, 1, 1]


@pytest.mark.parametrize("change", ["bit", "place", "count", "cut"])
def test_a_pack_that_was_changed_is_not_sound(change: str) -> None:
    (pack,) = encode_packs(output(b"hello", b"world"))
    sealed = seal(pack.checksum, 77, 2)
    data, id, count = bytearray(pack.data), 77, 2
    assert is_sound(id, count, sealed, bytes(data))

    match change:
        case "bit":
            data[5] ^= 1
        case "place":
            id = 78
        case "count":
            count = 3
        case "cut":
            del data[-1]

    assert not is_sound(id, count, sealed, bytes(data))


# The log against a list.

steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 40)),
        st.tuples(st.just("append"), st.sampled_from([1, 999, 1000, 1001, 2500])),
        st.tuples(st.just("read"), st.floats(0, 1)),
        st.tuples(st.just("trim"), st.floats(0, 1)),
        st.tuples(st.just("reopen"), st.just(0)),
        st.tuples(st.just("checkpoint"), st.just(0)),
    ),
    min_size=1,
    max_size=25,
)


@given(steps)
@settings(max_examples=40, deadline=None)
def test_the_log_is_a_list_that_is_cut_at_its_beginning(
    steps: list[tuple[str, float]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        datadir = Path(folder)
        model: list[bytes] = []
        low = 0
        log = _Opened(datadir)
        log.writer.declare([TopicInfo("t", 1, True, None, "", "")], [], GROUP)
        for step, argument in steps:
            match step:
                case "append":
                    first = len(model)
                    more = [b"%d" % n for n in range(first, first + int(argument))]
                    assert log.writer.append([output(*more)], False) == [first]
                    model += more
                case "read":
                    position = low + int(argument * (len(model) - low))
                    assert log.read_from(position) == model[position:]
                case "trim":
                    log.settle(low + int(argument * (len(model) - low)))
                    while trim_step(log.writer, time.time(), WEEK_S):
                        continue
                    settled = low + int(argument * (len(model) - low))
                    new_low = log.low()
                    assert low <= new_low <= settled
                    low = new_low
                case "reopen":
                    log.close()
                    log = _Opened(datadir)
                case "checkpoint":
                    log.checkpointer.step()
                    assert log.checkpointer.truncate()
        assert log.read_from(0) == model[low:]
        check_log(log.reader.db, datadir)
        log.close()


class _Opened:
    def __init__(self, datadir: Path) -> None:
        self.writer = Writer(datadir, default_partitions=1)
        self.reader = Reader(datadir, self.writer.turnstile)
        self.checkpointer = Checkpointer(datadir)

    def read_from(self, position: int) -> list[bytes | None]:
        values: list[bytes | None] = []
        while batch := self.reader.fetch("t", 0, position, 700, 1 << 20):
            assert batch.positions[0] >= position
            values += batch.values
            position = batch.end
        return values

    def settle(self, position: int) -> None:
        positions = {("reader", T0): position}
        self.writer.commit(Checkpoint(positions=positions), None)

    def low(self) -> int:
        return self.reader.extents()[self.writer.catalog.topics["t"].first_tp][0]

    def close(self) -> None:
        self.writer.close()
        self.reader.close()
        self.checkpointer.close()


# Retention.


def test_a_named_topic_keeps_its_age_and_what_is_not_committed(
    writer: Writer, reader: Reader
) -> None:
    writer.declare([TopicInfo("t", 2, False, 100.0, "", "")], [], GROUP)
    for _ in range(3):
        writer.append([output(b"1", b"2")], False)
    first_tp, now = writer.catalog.topics["t"].first_tp, time.time()
    make_older(writer, before=4, age_s=101.0)

    trim_step(writer, now, WEEK_S)
    assert reader.extents()[first_tp][0] == 0

    writer.commit(Checkpoint(positions={("reader", T0): 3}), None)
    trim_step(writer, now, WEEK_S)
    assert reader.extents()[first_tp][0] == 2

    writer.commit(Checkpoint(positions={("reader", T0): 6}), None)
    trim_step(writer, now, WEEK_S)
    assert reader.extents()[first_tp][:2] == (4, 6)


def make_older(writer: Writer, *, before: int, age_s: float) -> None:
    """Let the packs of T0 that begin before an offset be of another time."""
    first = writer.catalog.topics["t"].first_tp << OFFSET_BITS
    with writer.transaction() as db:
        db.execute(
            "UPDATE packs SET appended_at = appended_at - ? WHERE id >= ? AND id < ?",
            (age_s, first, first | before),
        )


def test_an_old_event_that_is_read_in_anew_is_kept_as_long_as_any_other(
    writer: Writer, reader: Reader
) -> None:
    writer.declare([TopicInfo("t", 2, False, 100.0, "", "")], [], [])
    now = time.time()
    writer.append([output(b"of last year", at=now - 365 * 86400)], False)
    writer.append([output(b"of next year", at=now + 365 * 86400)], False)
    first_tp = writer.catalog.topics["t"].first_tp

    trim_step(writer, time.time(), WEEK_S)
    assert reader.extents()[first_tp][:2] == (0, 2)

    trim_step(writer, time.time() + 101, WEEK_S)
    assert reader.extents()[first_tp][:2] == (2, 2)


def test_an_owned_topic_keeps_what_its_slowest_reader_has_not_committed(
    writer: Writer, reader: Reader
) -> None:
    agents = [AgentInfo(name, name, ["t"], 1, "retry", "") for name in ("fast", "slow")]
    group = GroupInfo("g", agents, [], 1, "")
    writer.declare([TopicInfo("t", 2, True, None, "", "")], [], [group])
    for n in range(4):
        writer.append([output(b"%d" % n)], False)
    first_tp = writer.catalog.topics["t"].first_tp

    writer.commit(Checkpoint(positions={("fast", T0): 4}), None)
    trim_step(writer, time.time(), WEEK_S)
    assert reader.extents()[first_tp][0] == 0

    writer.commit(Checkpoint(positions={("slow", T0): 2}), None)
    trim_step(writer, time.time(), WEEK_S)
    assert reader.extents()[first_tp][:2] == (2, 4)


def test_an_owned_topic_that_nobody_reads_is_kept_for_a_week(
    writer: Writer, reader: Reader
) -> None:
    writer.declare([TopicInfo("t", 2, True, None, "", "")], [], [])
    writer.append([output(b"old")], False)
    make_older(writer, before=1, age_s=WEEK_S + 1)
    writer.append([output(b"new")], False)

    trim_step(writer, time.time(), WEEK_S)

    assert reader.extents()[writer.catalog.topics["t"].first_tp][:2] == (1, 2)


def test_what_is_kept_for_ever_is(writer: Writer, reader: Reader) -> None:
    writer.declare([TopicInfo("t", 2, False, None, "", "")], [], [])
    writer.append([output(b"old")], False)

    trim_step(writer, time.time() + 1e9, None)

    assert reader.extents()[writer.catalog.topics["t"].first_tp][:2] == (0, 1)


def test_trimming_goes_in_small_turns_and_gives_the_bytes_back(
    writer: Writer, reader: Reader
) -> None:
    writer.declare([TopicInfo("t", 2, True, None, "", "")], [], GROUP)
    for n in range(150):
        writer.append([output(b"%d" % n)], False)
    writer.commit(Checkpoint(positions={("reader", T0): 150}), None)

    turns = 0
    while trim_step(writer, time.time(), WEEK_S):
        turns += 1

    assert turns == 2
    assert reader.extents()[writer.catalog.topics["t"].first_tp] == (150, 150, 0)


def test_a_reader_below_the_low_goes_on_at_the_low(writer: Writer, reader: Reader) -> None:
    writer.declare([TopicInfo("t", 2, True, None, "", "")], [], GROUP)
    for n in range(3):
        writer.append([output(b"%d" % n)], False)
    writer.commit(Checkpoint(positions={("reader", T0): 2}), None)
    trim_step(writer, time.time(), WEEK_S)

    batch = reader.fetch("t", 0, 0, 10, 1 << 20)

    assert batch is not None
    assert list(batch.positions) == [2]


def test_a_position_beyond_the_end_is_told_as_damage(writer: Writer) -> None:
    writer.commit(Checkpoint(positions={("reader", T0): 5}), None)

    with pytest.raises(LogDamaged, match=r"worked on t\[0\] up to 5, but the log ends at 0"):
        writer.claim(Subscription("app", "g", 0, 1, {"reader": ["t"]}, {}), "nowhere")


# Damage that SQLite does not see.


def test_a_reader_keeps_no_statement_of_its_opening_and_little_of_what_it_read(
    writer: Writer, reader: Reader
) -> None:
    kept, _ = reader.db.status(apsw.SQLITE_DBSTATUS_STMT_USED)
    for _ in range(10):
        writer.append([output(bytes(200_000))], False)
    tp_id = reader.catalog.tp_id(T0)
    assert tp_id is not None

    batch = reader.read(T0, tp_id, 0, 100, 10_000_000)

    assert kept == 0
    assert batch is not None
    assert len(batch.values) == 10
    assert reader.db.status(apsw.SQLITE_DBSTATUS_CACHE_USED)[0] < 100_000


def test_a_changed_pack_is_found_when_it_is_read(writer: Writer, reader: Reader) -> None:
    writer.append([output(b"first")], False)
    writer.append([output(b"last")], False)
    _change_pack(writer, 0)

    with pytest.raises(LogDamaged, match=r"the 1 events of t\[0\]@0 .* checksum"):
        reader.fetch("t", 0, 0, 10, 1 << 20)


def test_a_changed_newest_pack_is_found_at_start(
    writer: Writer, reader: Reader, tmp_path: Path
) -> None:
    writer.append([output(b"first")], False)
    check_log(reader.db, tmp_path)
    _change_pack(writer, 0)

    with pytest.raises(LogDamaged, match=r"t\[0\]@0"):
        check_log(reader.db, tmp_path)


def _change_pack(writer: Writer, offset: int) -> None:
    with writer.transaction() as db:
        id = query(db, "SELECT id FROM packs ORDER BY id LIMIT 1 OFFSET ?", (offset,))[0][0]
        data = bytearray(query(db, "SELECT data FROM packs WHERE id = ?", (id,))[0][0])
        data[3] ^= 4
        db.execute("UPDATE packs SET data = ? WHERE id = ?", (bytes(data), id))


def test_a_head_that_contradicts_its_packs_is_found_at_start(
    writer: Writer, reader: Reader, tmp_path: Path
) -> None:
    writer.append([output(b"1"), output(b"2")], False)
    with writer.transaction() as db:
        db.execute("DELETE FROM packs WHERE id = (SELECT max(id) FROM packs)")

    with pytest.raises(LogDamaged, match="ends at 2, its newest pack ends at 1"):
        check_log(reader.db, tmp_path)


def test_only_durable_appends_move_what_was_acknowledged(
    writer: Writer, tmp_path: Path
) -> None:
    first_tp = writer.catalog.topics["t"].first_tp

    writer.append([output(b"1")], False)
    assert Watermark(tmp_path).read() == {}
    writer.append([output(b"2")], True)
    writer.append([output(b"3", tp=TP("t", 1))], True)

    assert Watermark(tmp_path).read() == {first_tp: 2, first_tp + 1: 1}


def test_a_log_that_ends_below_what_was_acknowledged_is_refused(
    writer: Writer, reader: Reader, tmp_path: Path
) -> None:
    writer.append([output(b"1")], True)
    writer.watermark.raise_to({writer.catalog.topics["t"].first_tp: 3, 900: 1})

    with pytest.raises(LogDamaged, match="lost events that were acknowledged") as caught:
        check_log(reader.db, tmp_path)

    assert caught.value.seen == [
        "t[0] ends at 1, acknowledged was 3",
        "?[900] ends at 0, acknowledged was 1",
    ]
    assert str(tmp_path / "acknowledged") in str(caught.value.remedy)


def test_a_garbled_acknowledgement_is_left_out(tmp_path: Path) -> None:
    watermark = Watermark(tmp_path)
    watermark.raise_to({1: 10, 2: 20})
    watermark.close()
    data = bytearray(watermark.path.read_bytes())
    data[16 + 16] ^= 0xFF
    watermark.path.write_bytes(data)

    assert watermark.read() == {2: 20}


# Opening.


def test_a_newer_format_is_refused_and_not_touched(tmp_path: Path) -> None:
    Writer(tmp_path, 1).close()
    _with_sqlite(tmp_path, f"PRAGMA user_version={FORMAT + 1}")
    before = log_path(tmp_path).read_bytes()

    with pytest.raises(LogDamaged, match=f"has format {FORMAT + 1}") as caught:
        Writer(tmp_path, 1)

    assert caught.value.exit_code == 78
    assert log_path(tmp_path).read_bytes() == before


@pytest.mark.parametrize("content", ["other database", "text"])
def test_a_file_that_is_no_log_is_refused(tmp_path: Path, content: str) -> None:
    if content == "text":
        log_path(tmp_path).write_bytes(b"no database, but long enough to be read" * 50)
    else:
        _with_sqlite(tmp_path, "CREATE TABLE other (a)")
    before = log_path(tmp_path).read_bytes()

    with pytest.raises(LogDamaged) as caught:
        Writer(tmp_path, 1)

    assert caught.value.remedy
    assert log_path(tmp_path).read_bytes() == before


def _with_sqlite(datadir: Path, statement: str) -> None:
    db = apsw.Connection(str(log_path(datadir)))
    db.execute(statement).fetchall()
    db.close()


def test_a_data_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="data directory .* cannot be used"):
        Writer(tmp_path / "missing", 1)


def test_two_processes_make_one_log(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from streamd.agentproc.broker.writer import Writer\n"
        "Writer(pathlib.Path(sys.argv[1]), 1).make_topic('t')\n"
    )
    makers = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(4)
    ]

    assert [maker.wait(20) for maker in makers] == [0] * 4
    opened = Writer(tmp_path, 1)
    assert list(opened.catalog.topics) == ["t"]
    opened.close()


def test_a_forked_process_may_not_write_with_its_parents_connection(writer: Writer) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            writer.append([output(b"1")], False)
        except BrokerError:
            os._exit(7)
        os._exit(0)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_lock_that_another_program_keeps_is_told_with_a_cure(
    writer: Writer, tmp_path: Path
) -> None:
    writer.db.set_busy_timeout(50)
    # A program that knows nothing of turns, in a process of its own.
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sqlite3, sys, time\n"
            "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "db.execute('BEGIN IMMEDIATE'); print('held', flush=True); time.sleep(30)\n",
            str(log_path(tmp_path)),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()

    with pytest.raises(BrokerError, match="held by another program") as caught:
        writer.append([output(b"1")], False)
    holder.kill()
    holder.wait()
    holder.stdout.close()

    assert "fuser" in str(caught.value.remedy)
    assert writer.append([output(b"1")], False) == [0]


MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/vdb /home/local\\040disk xfs rw 0 0
"""


def test_a_network_file_system_is_refused() -> None:
    refuse_network_folder(Path("/srv/data"), MOUNTS)
    refuse_network_folder(Path("/home/local disk/data"), MOUNTS)
    refuse_network_folder(Path("/homes"), MOUNTS)

    with pytest.raises(ConfigError, match=r"network file system \(nfs4\)") as caught:
        refuse_network_folder(Path("/home/me/data"), MOUNTS)

    assert caught.value.exit_code == 78


def test_a_socket_path_that_is_too_long_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotPermitted, match="a Unix socket takes 107"):
        listen(tmp_path / ("x" * 108))


# The turnstile.


def test_a_turn_names_its_holder_and_is_free_after_it(tmp_path: Path) -> None:
    mine, other = Turnstile(tmp_path), Turnstile(tmp_path)
    assert other.turn() is None

    mine.enter()
    first = other.turn()
    mine.leave()
    mine.enter()

    assert first == (os.getpid(), 1)
    assert other.turn() == (os.getpid(), 2)
    mine.leave()
    assert other.turn() is None
    mine.close()
    other.close()


def test_the_turn_of_a_killed_process_is_free(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib, time\n"
            "from streamd.agentproc.broker.turnstile import Turnstile\n"
            "Turnstile(pathlib.Path(sys.argv[1])).enter()\n"
            "print('held', flush=True); time.sleep(30)\n",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    turnstile = Turnstile(tmp_path)
    assert turnstile.turn() == (holder.pid, 1)
    entered = threading.Thread(target=turnstile.enter)
    entered.start()

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    entered.join(5)

    assert not entered.is_alive()
    assert turnstile.last_holder() == os.getpid()
    turnstile.close()


# Checkpoints of the WAL.


def test_the_wal_is_emptied_once_nobody_writes(writer: Writer, tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    for n in range(20):
        writer.append([output(b"%d" % n * 1000)], False)
    assert checkpointer.wal_bytes > 0

    checkpointer.step()
    assert checkpointer.wal_bytes > 0
    checkpointer.step()

    assert checkpointer.wal_bytes == 0
    checkpointer.close()


def test_a_long_reader_keeps_the_wal_but_stops_nobody(writer: Writer, tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    reading = apsw.Connection(str(log_path(tmp_path)))
    reading.execute("BEGIN; SELECT count(*) FROM packs").fetchall()
    writer.append([output(b"1")], False)

    checkpointer.step()
    assert not checkpointer.truncate()
    assert writer.append([output(b"2")], False) == [1]
    reading.execute("COMMIT")
    reading.close()

    assert checkpointer.truncate()
    assert checkpointer.wal_bytes == 0
    checkpointer.close()


def test_writers_and_readers_never_checkpoint(tmp_path: Path) -> None:
    writer = Writer(tmp_path, default_partitions=2)
    for _ in range(40):
        writer.append([output(bytes(200_000))], False)
    size = Path(f"{log_path(tmp_path)}-wal").stat().st_size
    reader = Reader(tmp_path, writer.turnstile)
    reader.close()
    writer.close()

    assert Path(f"{log_path(tmp_path)}-wal").stat().st_size == size > 8_000_000


# Records from outside.


def test_records_are_placed_by_key_by_wish_or_in_turn() -> None:
    placing = Placing(lambda topic: 4)
    key = next(key for key in (b"%d" % n for n in range(99)) if partition_for(key, 4) == 2)
    records = [
        OutRecord("t", key, b"1"),
        OutRecord("t", None, b"2"),
        OutRecord("t", key, b"3", partition=3),
        OutRecord("t", None, b"4", timestamp=9.0, headers=[("h", b"x")]),
        OutRecord("t", key, b"5"),
    ]

    outputs, places = placing.outputs(records, now=5.0)
    answer = placed(outputs, [100 * (n + 1) for n in range(len(outputs))], places)

    assert [partition for partition, _ in answer] == [2, 0, 3, 1, 2]
    stamps = {output.tp.partition: output.timestamps for output in outputs}
    assert stamps == {2: [5.0, 5.0], 0: [5.0], 3: [5.0], 1: [9.0]}
    assert answer[4][1] == answer[0][1] + 1


def test_a_record_for_a_partition_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="partitions 0 to 3, not 4"):
        Placing(lambda topic: 4).outputs([OutRecord("t", None, b"", partition=4)], 1.0)


# Failpoints.


def test_a_failpoint_acts_at_its_turn_once() -> None:
    arm("commit.after-begin:2:raise")
    try:
        failpoint("commit.after-begin")
        failpoint("commit.after-outputs")
        with pytest.raises(FailpointError, match=r"commit\.after-begin"):
            failpoint("commit.after-begin")
        failpoint("commit.after-begin")
    finally:
        arm(None)


@pytest.mark.parametrize("text", ["nowhere:1:kill", "commit.after-begin:1:explode", "x", "::"])
def test_a_wrong_failpoint_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="name:nth:action"):
        arm(text)


def test_every_failpoint_is_in_the_code_and_in_the_table() -> None:
    rooms = [Path(__file__).parents[3] / name for name in ("agentproc", "supervisor")]
    code = "".join(path.read_text() for room in rooms for path in room.rglob("*.py"))

    passed = {part.split('"')[0] for part in code.split('failpoint("')[1:]}

    assert passed == set(FAILPOINTS)


BEFORE_COMMIT = [
    name
    for name in FAILPOINTS
    if name.startswith("commit.")
    and name not in {"commit.after-commit", "commit.after-leave", "commit.after-wake"}
]


@pytest.mark.parametrize("name", BEFORE_COMMIT)
def test_a_commit_that_fails_leaves_nothing_and_can_be_tried_again(
    writer: Writer, reader: Reader, name: str
) -> None:
    checkpoint = Checkpoint(outputs=[output(b"1")], positions={("a", T0): 0})
    writer.commit(checkpoint, None)
    arm(f"{name}:1:raise")
    try:
        with pytest.raises(FailpointError):
            writer.commit(checkpoint, None)
    finally:
        arm(None)

    assert reader.extents()[writer.catalog.topics["t"].first_tp][1] == 1
    assert writer.commit(checkpoint, None) == [1]
