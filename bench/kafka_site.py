"""An app of the bench on a Kafka cluster, and the page by which it is followed at no cost."""

import mmap
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from confluent_kafka import Consumer, TopicPartition
from instance import Instance, instance
from kafka_by_hand import PARTITIONS, PATIENCE_S, drop_topics

SETTLED = 8  # where in the beat page, see docs/internals.md
PAGE_BYTES = 4096


@contextmanager
def site(bootstrap: str, source: str, guarantee: str = "at_least_once") -> Iterator[Instance]:
    """An instance with an id of its own, which is also the app's; its topics go in the end.

    Args:
        source: With ID, and with SETTINGS, the arguments of `App` that name the cluster.
    """
    id = f"bench{uuid.uuid4().hex[:8]}"
    settings = (
        f'"{id}", broker="kafka://{bootstrap}", topic_partitions={PARTITIONS}, '
        f'processing_guarantee="{guarantee}"'
    )
    with instance(id, source.replace("SETTINGS", settings).replace("ID", id)) as bench:
        try:
            yield bench
        finally:
            bench.command("stop", check=False)
            drop_topics(bootstrap, id)


class Page:
    """What an agent process has settled, as its beat page says.

    Args:
        pid: Of the agent process.
        master: The pid of its master, which keeps the page.
    """

    def __init__(self, pid: int, master: int) -> None:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        inode = next(int(line.split()[4]) for line in maps if "memfd:streamd-beat" in line)
        for fd in Path(f"/proc/{master}/fd").iterdir():
            if "memfd:streamd-beat" in os.readlink(fd) and fd.stat().st_ino == inode:
                page = os.open(fd, os.O_RDWR)
                break
        else:
            raise SystemExit(f"the master holds no beat page of process {pid}")
        self._words = memoryview(mmap.mmap(page, PAGE_BYTES)).cast("q")
        os.close(page)

    @property
    def settled(self) -> int:
        """Events, since the process started."""
        return self._words[SETTLED // 8]

    def wait(self, what: str, true: Callable[[int], bool]) -> float:
        """Wait until as much is settled; the moment, unix seconds."""
        deadline = time.monotonic() + PATIENCE_S
        while not true(self.settled):
            if time.monotonic() > deadline:
                raise SystemExit(f"{what}: {self.settled} settled in {PATIENCE_S} s")
            time.sleep(0.01)
        return time.time()


def last_marker_at(bootstrap: str, topic: str) -> float:
    """When the newest record of a group's markers was written; unix seconds."""
    reader = Consumer(
        {"bootstrap.servers": bootstrap, "group.id": "none", "enable.auto.commit": False}
    )
    newest = 0.0
    for partition in range(PARTITIONS):
        place = TopicPartition(topic, partition)
        _, end = reader.get_watermark_offsets(place)
        # The last offsets may be marks of transactions, which are no records.
        place.offset = max(0, end - 4)
        reader.assign([place])
        while (message := reader.poll(1.0)) is not None:
            newest = max(newest, message.timestamp()[1] / 1000)
            if message.offset() >= end - 2:
                break
    reader.close()
    return newest
