"""A store: what is read from it was written by one save, whatever happened to the file."""

import asyncio
import fcntl
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from streamd.agentproc.broker import TP
from streamd.agentproc.kafka.markers import NOBODY, Incarnation, Marker
from streamd.agentproc.kafka.trusting import STALE_S, distrust
from streamd.agentproc.store.behind import Stores
from streamd.agentproc.store.file import INSERT_ROWS, Mark, StoreFile, StoreHeld
from streamd.agentproc.store.rows import Rows

ME, OTHER = Incarnation(3, 7), Incarnation(4, 1)


def mark(
    offset: int = 10,
    *,
    topic_id: str = "id",
    incarnation: Incarnation = ME,
    number: int = 5,
    resets: int = 0,
    moment: float = 1000.0,
) -> Mark:
    return Mark(topic_id, offset, incarnation, number, resets, moment)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreFile]:
    made = StoreFile(tmp_path / "store", "changes-0")
    yield made
    made.close()


def again(store: StoreFile) -> StoreFile:
    store.close()
    return StoreFile(store.path.parent, store.path.stem)


def test_a_new_store_holds_nothing_and_says_so(store: StoreFile) -> None:
    assert store.mark is None
    assert store.rows() == []


def test_what_was_saved_is_there_when_it_is_opened_again(store: StoreFile) -> None:
    many: list[tuple[bytes, bytes | None]] = [
        (b"%d" % n, b"v%d" % n) for n in range(2 * INSERT_ROWS + 3)
    ]
    store.save(many, mark(1))
    gone: list[tuple[bytes, bytes | None]] = [(key, None) for key, _ in many[3:]]
    store.save([*gone, (b"0", b"new"), (b"", b"")], mark(2))

    store = again(store)

    assert store.mark == mark(2)
    assert dict(store.rows()) == {b"": b"", b"0": b"new", b"1": b"v1", b"2": b"v2"}
    store.close()


def test_a_store_that_was_not_filled_to_its_end_holds_nothing(store: StoreFile) -> None:
    store.save([(b"old", b"1")], mark(1))
    store.begin_anew()
    store.add([(b"new", b"2")])

    store = again(store)

    assert store.mark is None
    store.begin_anew()
    store.add([(b"newer", b"3")])
    store.save([], mark(3))
    assert store.rows() == [(b"newer", b"3")]
    store.close()


def test_a_save_that_fails_leaves_what_was_there(store: StoreFile) -> None:
    store.save([(b"a", b"1")], mark(1))
    assert store._db is not None
    store._db.pragma("max_page_count", 10)
    with pytest.raises(apsw.FullError):
        store.save([(b"a", b"2"), (b"b", bytes(100_000))], mark(2))

    store = again(store)

    assert (store.mark, store.rows()) == (mark(1), [(b"a", b"1")])
    store.close()


def test_two_never_have_one_store(store: StoreFile) -> None:
    with pytest.raises(StoreHeld, match=r"another process has changes-0\.db"):
        StoreFile(store.path.parent, store.path.stem, patience_s=0.1)

    store = again(store)  # let go of, it is free

    lock = os.open(store.path.with_suffix(".lock"), os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)
    store.close()


WANTS = """
import sys
from pathlib import Path
from streamd.agentproc.store.file import StoreFile
StoreFile(Path(sys.argv[1]), sys.argv[2], patience_s=60).close()
"""


def test_who_waits_for_a_store_is_seen_by_who_has_it(store: StoreFile) -> None:
    assert not store.is_wanted()
    with pytest.raises(StoreHeld):
        StoreFile(store.path.parent, store.path.stem, patience_s=0)
    command = [sys.executable, "-c", WANTS, str(store.path.parent), store.path.stem]
    with subprocess.Popen(command) as other:
        deadline = time.monotonic() + 30
        while not store.is_wanted():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        store.close()
        assert other.wait(30) == 0

    store = StoreFile(store.path.parent, store.path.stem)
    assert not store.is_wanted()
    store.close()


def foreign(path: Path) -> None:
    path.unlink()
    apsw.Connection(str(path)).execute("CREATE TABLE rows (k, v); CREATE TABLE mark (data)")


def of_another_version(path: Path) -> None:
    apsw.Connection(str(path)).pragma("user_version", 99)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwritten(path: Path) -> None:
    path.write_bytes(b"no database at all" * 1000)


def with_another_mark(path: Path) -> None:
    apsw.Connection(str(path)).execute("UPDATE mark SET data = x'00'")


@pytest.mark.parametrize(
    "harm", [foreign, of_another_version, cut, overwritten, with_another_mark]
)
def test_a_file_that_is_not_as_it_must_be_is_made_anew_with_one_line(
    store: StoreFile, harm: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(harm)
    store.save([(b"%d" % n, b"v" * 100) for n in range(1000)], mark(1))
    store.close()
    harm(store.path)

    store = StoreFile(store.path.parent, store.path.stem)
    try:
        if store.mark is not None:  # the harm is found where the rows are read
            with pytest.raises(apsw.Error):
                store.rows()
            store.wipe("it is damaged")
        assert (store.mark, store.rows()) == (None, [])
        assert [r.getMessage()[:34] for r in caplog.records] == [
            "store changes-0.db is made anew: i"
        ]
        store.save([(b"a", b"1")], mark(2))
        assert store.rows() == [(b"a", b"1")]
    finally:
        store.close()


def trusted(
    held: Mark, newest: Marker, *, low: int = 0, high: int = 20, now: float = 1000.0
) -> str:
    return distrust(held, newest, "changes", "id", low, high, now)


def marker(
    incarnation: Incarnation = ME, number: int = 5, start: int = 4, resets: int = 0
) -> Marker:
    return Marker(incarnation, number, {"changes": start}, {}, {}, resets)


@pytest.mark.parametrize(
    ("held", "newest", "why"),
    [
        (mark(), marker(), ""),
        (mark(), marker(number=9), ""),
        (mark(), marker(OTHER, 0, start=10), ""),
        (mark(topic_id="older"), marker(), "made anew since"),
        (mark(), marker(resets=1), "reset since"),
        (mark(21), marker(), "up to offset 21, the changelog ends at 20"),
        (mark(number=6), marker(), "holds checkpoint 6, the last that counts is 5"),
        (mark(10), marker(OTHER, 0, start=9), "by an owner that was replaced"),
        (mark(10), Marker(NOBODY, 0, {}, {}, {}), "by an owner that was replaced"),
    ],
)
def test_a_store_is_used_where_the_changelogs_tail_makes_it_right(
    held: Mark, newest: Marker, why: str
) -> None:
    found = trusted(held, newest)

    assert why in found
    assert bool(why) == bool(found)


def test_a_store_from_before_what_the_changelog_still_has_is_not_used() -> None:
    assert "begins at 11" in trusted(mark(10), marker(), low=11)
    assert trusted(mark(10), marker(), low=10) == ""


def test_a_store_that_is_old_is_used_only_where_nothing_came_after_it() -> None:
    late = 1000.0 + STALE_S + 60

    assert "20 h old" in trusted(mark(), marker(number=6), now=late)
    assert trusted(mark(), marker(number=5), now=late) == ""
    assert trusted(mark(), marker(number=6), now=999.0) != ""


def test_changes_take_the_place_of_what_is_stored() -> None:
    values = [None, b"1", b"2"]
    for stored, changed in itertools.product(values, repeat=2):
        rows = Rows([(b"k", stored)] if stored else [], {b"k": changed, b"other": b"o"})
        rows.fold()
        expected = {b"other": b"o"} | ({b"k": changed} if changed else {})
        assert dict(rows.all) == expected
        assert rows.values_of({b"k", b"none"}) == {b"k": changed, b"none": None}
    assert Rows([(b"k", b"1")]).values_of({b"k"}) == {b"k": b"1"}


def test_a_fill_is_broken_off_where_the_store_is_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamd.agentproc.store.behind.SLICE_ROWS", 1)
    tp = TP("changes", 0)

    async def main() -> None:
        stores = Stores(tmp_path)
        assert await asyncio.to_thread(stores.open, tp) is None
        rows = Rows(changes={b"%d" % n: b"v" for n in range(50_000)})
        rows.fold()
        stores.begin(tp, rows)
        saving = stores.save({tp: mark(1)})
        async with asyncio.timeout(5):
            await stores.close()
            await saving

    asyncio.run(main())

    store = StoreFile(tmp_path, "changes-0")
    assert store.mark is None
    store.close()


def test_what_came_while_a_store_was_filled_is_saved_with_the_next_mark(
    tmp_path: Path,
) -> None:
    tp = TP("changes", 0)

    async def main() -> None:
        stores = Stores(tmp_path)
        await asyncio.to_thread(stores.open, tp)
        rows = Rows(changes={b"a": b"1", b"b": b"1"})
        rows.fold()
        stores.begin(tp, rows)
        stores.change(tp, [(b"a", b"2")])
        first = stores.save({tp: mark(1)})
        stores.change(tp, [(b"b", None), (b"c", b"3")])
        assert stores.waiting == 2
        await first
        await stores.save({tp: mark(2)})
        await stores.close()

    asyncio.run(main())

    store = StoreFile(tmp_path, "changes-0")
    assert store.mark == mark(2)
    assert dict(store.rows()) == {b"a": b"2", b"c": b"3"}
    store.close()
