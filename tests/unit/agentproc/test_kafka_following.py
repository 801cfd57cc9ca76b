"""A copy of a partition, followed bit by bit, against a recovery that reads everything.

The histories are made by chance: owners that die between rows and marker, that go on after
they were replaced, that take over at the same time; what the copy has read of the two logs
when is chance, too.
"""

import random
import time
from dataclasses import dataclass, field

import pytest

from streamd.agentproc.kafka.choosing import followed
from streamd.agentproc.kafka.following import Following
from streamd.agentproc.kafka.markers import STAMP_BYTES, Marker, Newest, counts, newest
from streamd.agentproc.kafka.producing import STAMP_HEADER
from streamd.agentproc.kafka.trusting import distrust
from streamd.agentproc.store.file import Mark
from streamd.wire import Described, Member

LOG = "changes"
Table = dict[bytes, bytes]


@dataclass(frozen=True)
class Record:
    """A record of a changelog, as the client gives it."""

    at: int
    name: bytes
    stamp: bytes
    data: bytes | None

    def offset(self) -> int:
        return self.at

    def key(self) -> bytes:
        return self.name

    def value(self) -> bytes | None:
        return None if self.data is None else self.stamp + self.data

    def headers(self) -> list[tuple[str, bytes]] | None:
        return [(STAMP_HEADER, self.stamp)] if self.data is None else None


@dataclass
class Logs:
    """The two logs of a partition, and whoever has ever written to them."""

    luck: random.Random
    markers: list[Marker] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    owners: list[Marker] = field(default_factory=list)  # by its last marker; the last one owns

    def write(self, key: bytes, stamp: bytes, data: bytes | None) -> None:
        self.records.append(Record(len(self.records), key, stamp, data))

    def table(self) -> Table:
        """What counts, as a recovery finds it."""
        return restore({}, self.records, newest(self.markers))

    def claim(self) -> None:
        """Someone takes over: what does not count is repaired."""
        before = newest(self.markers)
        table, start = self.table(), before.starts.get(LOG, 0)
        late = {
            r.name for r in self.records if r.at >= start and not is_counted(r, before, start)
        }
        last = max((m.incarnation for m in self.markers), default=before.incarnation)
        mine = last.successor()
        for key in late:
            self.write(key, mine.stamp(0), table.get(key))
        over, number = before.incarnation, before.number
        claim = Marker(mine, 0, {LOG: len(self.records)}, {}, {}, over=over, over_number=number)
        if self.luck.random() < 0.2:
            # Whoever it takes over from makes a checkpoint just now: the claim is nothing.
            self.checkpoint(len(self.owners) - 1)
        self.markers.append(claim)
        self.owners.append(claim)

    def checkpoint(self, which: int, *, dies: bool = False) -> None:
        """An owner writes rows, and says that they count, unless it dies before that."""
        if which < 0:
            return
        owner = self.owners[which]
        number = owner.number + 1
        for _ in range(self.luck.randrange(1, 4)):
            data = None if self.luck.random() < 0.2 else b"%d" % len(self.records)
            self.write(b"%d" % self.luck.randrange(8), owner.incarnation.stamp(number), data)
        if not dies:
            marker = Marker(owner.incarnation, number, owner.starts, {}, {})
            self.owners[which] = marker
            self.markers.append(marker)

    def go_on(self) -> None:
        match self.luck.randrange(10):
            case 0:
                self.claim()
            case 1:
                self.checkpoint(len(self.owners) - 1, dies=True)
                self.claim()
            case 2:
                self.checkpoint(len(self.owners) - 2)
            case _:
                self.checkpoint(len(self.owners) - 1)


def is_counted(record: Record, marker: Marker, start: int) -> bool:
    return counts(record.stamp, record.at, marker, start)


def restore(table: Table, records: list[Record], marker: Marker) -> Table:
    """A table with what counts of these records, as a recovery applies them."""
    table, start = dict(table), marker.starts.get(LOG, 0)
    for record in records:
        if is_counted(record, marker, start):
            if record.data is None:
                table.pop(record.name, None)
            else:
                table[record.name] = record.data
    return table


class Copy:
    """Reads the logs by chance, and keeps a store."""

    def __init__(self, logs: Logs) -> None:
        self._logs = logs
        self._newest = Newest()
        self._markers = 0
        self.following = Following(LOG, 0, self._newest.marker)
        self.store: Table = {}
        self.mark: Mark | None = None
        self.begins = 0

    def read(self, luck: random.Random) -> None:
        if luck.random() < 0.5:
            until = luck.randint(self._markers, len(self._logs.markers))
            self.see(self._logs.markers[self._markers : until])
        elif records := self._logs.records[self.following.position :]:
            again = max(0, self.following.position - luck.randrange(3))
            self.following.read(self._logs.records[again : records[0].at + luck.randint(1, 9)])

    def see(self, markers: list[Marker]) -> None:
        for marker in markers:
            self._newest.add(marker)
        self._markers += len(markers)
        if not self.following.knows(self._newest.marker):
            self.begins += 1
            self.store, self.mark = {}, None
            self.following = Following(LOG, 0, self._newest.marker)

    def save(self) -> None:
        for key, value in self.following.take():
            if value is None:
                self.store.pop(key, None)
            else:
                self.store[key] = value
        marker = self._newest.marker
        self.mark = Mark(
            "id", self.following.offset, marker.incarnation, marker.number - 1, 0, time.time()
        )

    def reads_on(self) -> int | None:
        """From where a recovery reads the changelog; None: the store is not trusted."""
        if self.mark is None:
            return None
        marker, high, now = newest(self._logs.markers), len(self._logs.records), time.time()
        why = distrust(self.mark, marker, LOG, "id", 0, high, now)
        return None if why else self.mark.offset


@pytest.mark.parametrize("seed", range(60))
def test_whoever_takes_over_with_a_copy_finds_what_a_whole_recovery_finds(seed: int) -> None:
    luck = random.Random(seed)
    logs = Logs(luck)
    logs.claim()
    copy = Copy(logs)
    tries = trusted = 0
    for _ in range(300):
        logs.go_on()
        for _ in range(luck.randrange(4)):
            copy.read(luck)
        if luck.random() < 0.5:
            copy.save()
        offset = copy.reads_on()
        tries += 1
        if offset is not None:
            trusted += 1
            marker = newest(logs.markers)
            assert restore(copy.store, logs.records[offset:], marker) == logs.table()
    assert trusted > tries / 3


def test_a_copy_that_has_read_everything_holds_what_counts_and_no_more() -> None:
    logs = Logs(random.Random(1))
    logs.claim()
    copy = Copy(logs)
    for number in range(20):
        logs.checkpoint(0, dies=number == 19)
    copy.following.read(logs.records)
    copy.save()
    assert (copy.store, copy.following.waits) == ({}, True)

    copy.see(logs.markers)
    copy.save()
    assert copy.store == logs.table()
    assert copy.following.waits
    assert copy.following.offset < copy.following.position == len(logs.records)


def test_what_an_owner_wrote_for_nobody_spoils_a_copy_that_has_it() -> None:
    logs = Logs(random.Random(2))
    logs.claim()
    copy = Copy(logs)
    logs.checkpoint(0)
    before = len(logs.records), len(logs.markers)
    logs.checkpoint(0)
    copy.see(logs.markers)
    copy.following.read(logs.records)
    # Whoever takes over has not seen the last checkpoint, and says so by its claim.
    incarnation = logs.owners[0].incarnation.successor()
    claim = Marker(incarnation, 0, {LOG: before[0]}, {}, {}, over=incarnation)
    logs.markers.append(claim)
    copy.see([claim])

    assert copy.begins == 1
    copy.following.read(logs.records)
    copy.save()
    assert copy.store == logs.table()


def test_the_stamp_of_a_value_has_the_length_that_is_cut_off() -> None:
    assert (
        len(Marker(newest([]).incarnation, 0, {}, {}, {}).incarnation.stamp(1)) == STAMP_BYTES
    )


def members(*hosts: tuple[str, int]) -> Described:
    """Hosts with so many processes each; eight partitions are shared by turns."""
    names = [f"gateway;g;{slot};{host}" for host, slots in hosts for slot in range(slots)]
    return Described(
        [
            Member(name, "gateway", list(range(at, 8, len(names))))
            for at, name in enumerate(names)
        ],
        settled=True,
    )


def copies(found: Described, count: int) -> dict[int, list[str]]:
    """The hosts that follow each partition."""
    followers: dict[int, list[str]] = {partition: [] for partition in range(8)}
    for member in found.members:
        for partition in followed(found, member.name, count):
            followers[partition].append(member.name.rpartition(";")[2])
    return followers


def test_each_partition_is_followed_once_on_so_many_hosts_and_never_on_its_owners() -> None:
    for hosts in ([("a", 2), ("b", 2)], [("a", 1), ("b", 3), ("c", 2)], [("a", 4)]):
        found = members(*hosts)
        owner = {p: m.name.rpartition(";")[2] for m in found.members for p in m.partitions}
        for count in range(4):
            expected = min(count, len(hosts) - 1)
            for partition, followers in copies(found, count).items():
                assert len(followers) == len(set(followers)) == expected
                assert owner[partition] not in followers


def test_the_processes_of_a_host_share_what_it_follows() -> None:
    found = members(("a", 1), ("b", 2))
    mine = [followed(found, member.name, 1) for member in found.members[1:]]
    assert all(mine)
    assert not mine[0] & mine[1]
    assert mine[0] | mine[1] == set(found.members[0].partitions)
