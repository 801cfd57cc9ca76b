"""Who of a group may get an event now, and what is in work."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

from streamd.agentproc.beats import Beats
from streamd.agentproc.delivery import Actor, Feed
from streamd.agentproc.errand import Errand

ASK_PATIENCE_S = 0.5  # then an ask of another group may need any agent of this one


class Gate:
    """Between the events that were read and the agents of one group.

    It is shut for a checkpoint, which waits until nothing is in work, for a roll-back, while
    partitions are given away, and for all others while one event is tried alone. An `ask` of
    the group's own code goes before these, but for a roll-back: its answer may be behind the
    gate.
    """

    def __init__(
        self, group: str, feeds: Sequence[Feed], beats: Beats, on_quiet: Callable[[], None]
    ) -> None:
        self.working: set[Actor | Errand] = set()  # what is in work
        self.quiet = asyncio.Event()  # nothing is
        self.quiet.set()
        self.steady = asyncio.Event()  # no roll-back is under way
        self.steady.set()
        self.asked: Counter[str] = Counter()  # agent -> asks by this group's code that wait
        self.solo: Actor | None = None  # the only one that may get an event now
        self.gives_way = False  # until partitions are given away
        self._is_shut = False  # until a checkpoint has begun
        self._group = group
        self._feeds = feeds
        self._beats = beats
        self._on_quiet = on_quiet
        self._oldest_at = 0.0  # monotonic; since when the oldest in work is

    def lets(self, actor: Actor) -> bool:
        """May this actor get an event now?"""
        if not self.steady.is_set():
            return False
        if self.asked[actor.agent.name]:
            return True
        if self.asked.total() and self._patience_is_over():
            # Perhaps the agent that was asked, in another group, asks this one.
            return not any(
                isinstance(other, Actor) and other.asks.total() and other.feed is actor.feed
                for other in self.working
            )
        if self._is_shut or self.gives_way:
            return False
        return self.solo is None or self.solo is actor

    def _patience_is_over(self) -> bool:
        return any(time.monotonic() - other.since > ASK_PATIENCE_S for other in self.working)

    def asking(self, agent: str, change: int) -> None:
        """An `ask` of an agent, by this group's code, begins (+1) or ends (-1) to wait."""
        self.asked[agent] += change
        self.wake()
        if change > 0:
            asyncio.get_running_loop().call_later(ASK_PATIENCE_S, self.wake)

    def started(self, worker: Actor | Errand) -> None:
        """An actor got events, or an errand wrote."""
        if not self.working:
            self._oldest_at = worker.since  # else another's is older
        self.working.add(worker)
        self.quiet.clear()
        self._beats.in_work(self._group, len(self.working), self._oldest_at)

    def stopped(self, worker: Actor | Errand) -> None:
        """An actor has no events in hand any more, or an errand is over."""
        self.working.discard(worker)
        self._oldest_at = min((other.since for other in self.working), default=0.0)
        self._beats.in_work(self._group, len(self.working), self._oldest_at)
        if not self.working:
            self.quiet.set()
            self._on_quiet()

    def shut(self) -> None:
        """Let nobody have an event until `open`."""
        self._is_shut = True

    def open(self) -> None:
        """Take `shut` back."""
        if self._is_shut:
            self._is_shut = False
            self.wake()

    async def wait_quiet(self) -> bool:
        """Shut until nothing is in work; False when a roll-back came first."""
        self.shut()
        while self.steady.is_set() and not self.quiet.is_set():
            await self.quiet.wait()
        return self.steady.is_set()

    def let_go_of(self, actor: Actor) -> None:
        """The event of `actor` that was tried alone is over."""
        if self.solo is actor:
            self.solo = None
        self.wake()

    def forget(self) -> None:
        """Nothing that was in work, or waited, is there any more."""
        self.working.clear()
        self.quiet.set()
        self.solo = None
        self.asked.clear()

    def cut(self) -> None:
        """Hand out no more of the strides that are in work."""
        for worker in self.working:
            worker.cut()

    def wake(self) -> None:
        """Let every actor that waits look again."""
        for feed in self._feeds:
            feed.wake()

    def busy_with(self, *, keys: bool = False) -> list[str]:
        """What is in work, the longest first; with the events' keys, which are the user's."""
        running = sorted(self.working, key=lambda worker: worker.since)
        return [worker.describe(key=keys) for worker in running]
