"""The thread that keeps copies, beside owners whose rows and markers are written by hand."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kafka_hosts import eventually
from kafka_sessions import Place

from streamd.agentproc.kafka import declaring, options
from streamd.agentproc.kafka.markers import Incarnation, Marker, encode_marker, marker_key
from streamd.agentproc.kafka.producing import Row
from streamd.agentproc.kafka.recovery import Home
from streamd.agentproc.kafka.standby import Standby
from streamd.agentproc.store.file import StoreFile

Table = dict[bytes, bytes]


class Followed:
    """A table of one partition, and a thread that follows it."""

    def __init__(self, kafka: str, folder: Path) -> None:
        self.place = Place(kafka)
        self.folder = folder
        self._broker = self.place.broker()
        place, settings = self.place, self._broker.settings
        kept = declaring.kept_by(settings, "g", {"counts": 1}, {place.words: 1})
        found = self._broker.ensure([self._broker.wanted(place.words), *kept])
        self.ids = {place.changelog: found[place.changelog].id}
        self.owner = self.place.take().marker

    @contextmanager
    def followed(self) -> Iterator[Standby]:
        place = self.place
        home = Home(
            [place.words], place.markers, {"counts": place.changelog}, False, frozenset()
        )
        reader = options.reader(self._broker.reach, "standby", fetch_wait_max_ms=50)
        standby = Standby(
            reader, home, self.folder, self._broker.admin, self._broker.health, self.ids
        )
        standby.start()
        standby.follow({0})
        try:
            yield standby
        finally:
            standby.end()
            standby.join(20)
            assert not standby.is_alive()

    def write(self, owner: Marker, **values: str | None) -> Marker:
        """Rows of an owner's next checkpoint; its marker, which is not written."""
        marker = Marker(owner.incarnation, owner.number + 1, owner.starts, {}, {})
        stamp = marker.incarnation.stamp(marker.number)
        self.place.write([
            Row(self.place.changelog, 0, key.encode(),
                None if value is None else stamp + value.encode(), stamp)
            for key, value in values.items()
        ])  # fmt: skip
        return marker

    def mark(self, marker: Marker) -> Marker:
        key = marker_key(marker.incarnation)
        self.place.write([Row(self.place.markers, 0, key, encode_marker(marker))])
        return marker

    def held(self) -> Table:
        """What the store holds; it must have been let go of."""
        store = StoreFile(self.folder, f"{self.place.changelog}-0", patience_s=0)
        try:
            return dict(store.rows())
        finally:
            store.close()

    def copied(self) -> Table:
        """What a copy holds that has read all there is, while its thread ends."""
        with self.followed() as standby:
            eventually(lambda: [row.behind for row in standby.rows] == [0])
        return self.held()


@pytest.fixture(autouse=True)
def quick_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamd.agentproc.kafka.standby.TELL_S", 0.05)


def test_what_no_marker_covers_is_read_and_not_kept(kafka: str, tmp_path: Path) -> None:
    table = Followed(kafka, tmp_path)
    first = table.mark(table.write(table.owner, a="1", b="1"))
    second = table.write(first, a="2", b=None, c="2")

    assert table.copied() == {b"a": b"1", b"b": b"1"}
    table.mark(second)
    assert table.copied() == {b"a": b"2", b"c": b"2"}


def test_a_copy_of_what_an_owner_wrote_for_nobody_is_made_anew(
    kafka: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = Followed(kafka, tmp_path)
    first = table.mark(table.write(table.owner, a="1"))
    with table.followed() as standby:
        table.mark(table.write(first, a="late", b="late"))
        eventually(lambda: [row.behind for row in standby.rows] == [0])
        # Who takes over has not seen the last checkpoint: only what lies before it counts.
        claim = Marker(
            first.incarnation.successor(), 0, {table.place.changelog: 1}, {}, {},
            over=Incarnation(99, 0),
        )  # fmt: skip
        table.mark(table.write(table.mark(claim), c="3"))
        eventually(lambda: not standby.rows)
        assert caplog.text.count("made anew: it was written by an owner that was replaced") == 1
        standby.follow({0})
        eventually(lambda: [row.behind for row in standby.rows] == [0])
    assert table.held() == {b"a": b"1", b"c": b"3"}


def test_a_copy_that_was_behind_for_too_long_is_made_anew(
    kafka: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = Followed(kafka, tmp_path)
    table.mark(table.write(table.owner, a="1"))
    assert table.copied() == {b"a": b"1"}

    with monkeypatch.context() as patch, table.followed():
        patch.setattr("streamd.agentproc.kafka.standby.STALE_S", -1.0)
        eventually(lambda: "made anew: it was behind for 0 h" in caplog.text)
    assert table.held() == {}
    assert table.copied() == {b"a": b"1"}


WANTS = """
import sys
from pathlib import Path
from streamd.agentproc.store.file import StoreFile
store = StoreFile(Path(sys.argv[1]), sys.argv[2], patience_s=60)
print(sorted(store.rows()))
"""


def test_another_process_that_wants_a_store_has_it_with_all_that_was_read(
    kafka: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamd.agentproc.kafka.standby.SAVE_S", 3600.0)
    table = Followed(kafka, tmp_path)
    table.mark(table.write(table.owner, a="1"))
    with table.followed() as standby:
        eventually(lambda: [row.behind for row in standby.rows] == [0])
        command = [sys.executable, "-c", WANTS, str(tmp_path), f"{table.place.changelog}-0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "[(b'a', b'1')]\n"
        eventually(lambda: not standby.rows)


def test_without_a_place_for_a_store_nothing_is_followed_and_nothing_else_is_harmed(
    kafka: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "store").write_text("a file")
    table = Followed(kafka, tmp_path / "store")
    with table.followed() as standby:
        eventually(lambda: "partition 0 is not followed any more" in caplog.text)
        standby.follow({0})
        assert standby.is_alive()
    assert caplog.text.count("is not followed any more") == 1
