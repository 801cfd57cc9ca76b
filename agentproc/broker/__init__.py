"""What the engine asks of a broker: the seam between it and embedded, memory and Kafka.

A position is an int that orders the events of a partition. The embedded log and memory use
the event's offset; Kafka uses offset << INDEX_BITS | index in the pack. A stored position is
always the next one to read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from streamd.wire import StandbyRow

INDEX_BITS = 10

Headers = list[tuple[str, bytes]]


class TP(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]"


@dataclass(slots=True)
class Batch:
    """Events of one partition, in order, as bytes. The columns have one length, never 0."""

    tp: TP
    positions: Sequence[int]
    keys: list[bytes | None]
    values: list[bytes | None]
    timestamps: Sequence[float]  # unix seconds
    headers: list[Headers] | None  # None: no event of the batch has any
    end: int  # the position to read after the last one


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive events of an output, and the events that they were sent for."""

    count: int
    agent: str = ""  # that sent them
    tp: TP | None = None  # of the events that it worked on
    positions: Sequence[int] | None = None  # of the event of each, ascending; None: unknown


@dataclass(slots=True)
class Output:
    """Events to append to one partition, in order. The columns have one length, never 0."""

    tp: TP
    keys: list[bytes | None]
    values: list[bytes | None]
    timestamps: list[float]
    headers: list[Headers] | None = None
    sources: list[Segment] | None = None  # covers all of them; None: nothing is known


@dataclass(slots=True)
class TableChange:
    """What changed in one partition of a table: key -> new value, None for deleted."""

    table: str
    partition: int
    rows: list[tuple[bytes, bytes | None]]


@dataclass(slots=True)
class Checkpoint:
    """What is made durable together, or not at all."""

    outputs: list[Output] = field(default_factory=list)
    changes: list[TableChange] = field(default_factory=list)
    positions: dict[tuple[str, TP], int] = field(default_factory=dict)  # (agent, tp) -> next
    durable: bool = False  # must survive power loss before commit() returns

    def __bool__(self) -> bool:
        return bool(self.outputs or self.changes or self.positions)


@dataclass(frozen=True, slots=True)
class Subscription:
    """What one slot of a group reads and holds."""

    app_id: str
    group: str
    slot: int
    slots: int
    agents: dict[str, list[str]]  # agent -> topics
    tables: dict[str, int]  # table -> partitions
    # topic -> where an agent without a position begins: earliest (else), latest, error
    resets: dict[str, str] = field(default_factory=dict)

    def partitions(self, count: int) -> list[int]:
        """Which of a topic's or table's `count` partitions this slot has."""
        return list(range(self.slot, count, self.slots))


class Holder(Protocol):
    """What holds partitions, where a session's come and go: an engine."""

    async def lose(self, partitions: list[int], *, gone: bool) -> None:
        """Settle and make durable what is in work, then forget these partitions.

        Args:
            gone: They are another process's already: nothing of them can be made durable.
        """

    def recovers(self) -> None:
        """Partitions are about to be gained: the session's `recovering` says which."""

    async def gain(self, partitions: list[int]) -> None:
        """Load these partitions; the session's `positions` have them."""

    def has_gained(self) -> None:
        """What was gained is owned from now on: no partition is `recovering`."""


class Session(Protocol):
    """The broker as one slot of a group sees it. All calls are made on the loop's thread."""

    positions: dict[tuple[str, TP], int]
    """Where each agent reads on, per partition of its topics; set by `open`, and before
    partitions are gained."""

    partitions: list[int]
    """The partitions that this slot has, of all its topics and tables; set by `open`, and
    changed where partitions come and go."""

    recovering: list[int]
    """The partitions that it is about to have: what they hold is being found out."""

    generation: int
    """The epoch of the claim; set by `open`, and raised by each change of the partitions."""

    topic_limits: dict[str, int]
    """The most bytes of key and value of a topic's record, where there is a limit; set by
    `open`."""

    table_limits: dict[str, int]
    """The same of a table's row."""

    async def open(self) -> None:
        """Claim the slot's partitions; whoever had them can commit no more.

        Raises:
            BrokerError: The log cannot be opened or used; the text says why.
        """

    async def load(self, table: str, partition: int) -> list[tuple[bytes, bytes]]:
        """Every committed row of a partition of a table."""

    async def poll(self, max_events: int) -> list[Batch]:
        """Wait for events and return them, at most about `max_events`, in order in a partition.

        Reads on from the read position of each partition: at first the lowest that its agents
        have, then after what was last returned, or where `seek` set it. A chunk may hold
        several batches, not two of one partition. Cancelling it loses nothing.
        """

    def seek(self, tp: TP, position: int) -> None:
        """Read on from `position`."""

    async def commit(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint durable in one transaction; one at a time.

        Raises:
            Fenced: Another process claimed a partition since; nothing was written.
            Outdated: A partition is about to be lost, perhaps to be gained anew: whether this
                counts, what is recovered then knows. It must not be tried again.
            BrokerError: Nothing was written, e.g. the disk is full; it may be tried again.
        """

    async def append(self, outputs: list[Output], *, durable: bool = False) -> list[int]:
        """Append at once, outside any checkpoint; the offset of the first event of each."""

    def partitions_of(self, topic: str) -> int:
        """How many partitions a topic has; a topic that is not there is made."""

    async def most_bytes(self, topic: str) -> int:
        """Of key and value of a record of any topic, also one that the app does not name."""

    def is_sure(self) -> bool:
        """May this slot answer for its partitions at this moment, as far as it knows? From any
        thread. False after a stop that was so long that another may have them."""

    def behind(self) -> dict[str, int]:
        """How many events each agent has not settled, from `positions` as last committed."""

    async def close(self, *, leave: bool = False) -> None:
        """Stop reading and let go of everything; commits nothing.

        Args:
            leave: For good: where others take over what a member has, they may at once.
                Without it a successor in the same slot has the same partitions.
        """


class Lead(Protocol):
    """One process of all hosts leads a group; this one may be it."""

    def holds(self) -> bool:
        """Does this process surely lead at this very moment?"""

    async def close(self, *, leave: bool) -> None:
        """Lead no more, without telling; `leave`: for good, see `Session.close`."""


class SoleHost:
    """Where there is one host, its process leads."""

    def holds(self) -> bool:
        return True

    async def close(self, *, leave: bool) -> None:
        """Nobody else would lead."""


class Broker(Protocol):
    """A way to make sessions; one a process."""

    traces: bool
    """Does it want to know for which events an output's were sent (`Output.sources`)?"""

    installation: str
    """Tells this host's processes from those of others; "" where there are no others."""

    @property
    def waits_for(self) -> str:
        """What it waits for now, for people: a cluster that is away, a long recovery; or ""."""

    def client_figures(self) -> dict[str, float]:
        """What its clients count of themselves, by name; empty where there are none."""

    def standby(self) -> list[StandbyRow]:
        """The partitions of other hosts that its sessions follow; none where there is one."""

    def session(self, subscription: Subscription, holder: Holder | None = None) -> Session:
        """A session that is not open yet.

        Args:
            holder: Who is told of partitions that come and go; without one they are given
                away as they are.
        """

    async def lead(self, group: str, tell: Callable[[bool], None]) -> Lead:
        """Stand for the choice of the process that does what `group` does once.

        Of each host one process stands. At any moment at most one leads; after its host died,
        another one does within the session and 2 s.

        Args:
            tell: Called at each change: this process leads from now on, or does not any more.
        """

    async def close(self) -> None:
        """Close what the sessions shared."""
