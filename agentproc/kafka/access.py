"""The topics of one session: watched while it runs, waited for where they are needed.

A source that was deleted and made anew has another id. What is held of it then goes back to
the group, which takes it over from the beginning of the new topic.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from streamd.agentproc.kafka.obstacles import (
    AGAIN_S,
    LOOK_S,
    RARELY_S,
    RARER,
    READ,
    WRITE,
    Look,
    Needs,
    Way,
    barred,
    look,
    sentences,
)
from streamd.errors import BrokerError, StreamdError

if TYPE_CHECKING:
    from streamd.agentproc.broker.kafka import KafkaBroker


CLOCK_S = 60.0
CLOCK_SET_S = 1.0  # it runs otherwise by less


def _clock() -> float:
    """What the host's clock says, apart from what it should say as time goes by."""
    return time.time() - time.monotonic()


class Access:
    """See the module.

    Args:
        member_of: The group's id on the cluster.
        sources: Topics that are read.
        kept: Those of markers and rows, which are read and written.
    """

    def __init__(
        self,
        broker: "KafkaBroker",
        group: str,
        member_of: str,
        sources: Iterable[str],
        kept: Iterable[str],
    ) -> None:
        self.count = 0  # partitions of each
        self._broker = broker
        self._member_of = member_of
        self._kept = list(kept)
        self.read(sources)
        self._reading = Way(broker.health, f"group {group}")
        self._writing = Way(broker.health, f"a checkpoint of group {group}")
        self._soon = asyncio.Event()
        self._astray: StreamdError | None = None
        self._given_back: set[tuple[str, str]] = set()  # topics that were made anew, and ids

    def read(self, sources: Iterable[str], matched: frozenset[str] = frozenset()) -> None:
        """These are read from now on.

        Args:
            matched: Of them those that need not be there: a pattern means them while they are.
        """
        names = list(sources)
        self._sources = [name for name in names if name not in matched]
        self._matched = matched
        self._needs: Needs = {
            **dict.fromkeys(names, READ), **dict.fromkeys(self._kept, READ | WRITE)
        }  # fmt: skip

    # In threads; these block.

    def wait_permitted(self) -> None:
        """Until no topic that is there is forbidden."""
        self._wait(self._reading, lambda: Look(forbidden=self._look(self._needs).forbidden))

    def _barred(self) -> list[str]:
        return barred({self._member_of: self._broker.roster.question(self._member_of)})

    def wait_clear(self) -> dict[str, str]:
        """Until all topics are there and may be used; the id of each."""
        seen = self._wait(self._reading, lambda: self._look(self._needs))
        return {name: topic.id for name, topic in seen.found.items()}

    def wait_writable(self, names: Iterable[str]) -> None:
        """Until these topics are there and may be written to."""
        needs = dict.fromkeys(names, WRITE)
        self._wait(self._writing, lambda: self._look(needs))

    def wait_timely(self, names: Iterable[str]) -> None:
        """Until this host's clock was set, or for a minute: topics refused its timestamps."""
        clock = _clock()
        deadline = time.monotonic() + CLOCK_S
        self._writing.tell(
            f"waits for the right time: topic {name!r} refuses its timestamps; set this host's "
            "clock, or send nothing with a timestamp= that far ahead"
            for name in sorted(names)
        )
        while abs(_clock() - clock) < CLOCK_SET_S and time.monotonic() < deadline:
            time.sleep(AGAIN_S)
        self._writing.tell(())

    def _wait(self, way: Way, look: Callable[[], Look]) -> Look:
        before: list[str] = []
        while texts := self._sentences(seen := look()):
            # A broker that has just come back does not know all topics at once.
            if texts == before:
                way.tell(texts)
            before = texts
            time.sleep(AGAIN_S)
        way.tell(())
        return seen

    def _look(self, needs: Needs) -> Look:
        seen = self._broker.patiently(lambda: look(self._broker.admin, needs))
        seen.gone = [name for name in seen.gone if name not in self._matched]
        return seen

    def _sentences(self, seen: Look) -> list[str]:
        counts = {name: self._broker.wanted(name).partitions for name in seen.gone}
        counts |= dict.fromkeys(counts.keys() & self._needs.keys(), self.count or 1)
        name = self._broker.reach.given.get("sasl.username")
        return sentences(seen, f"user {name!r}" if name else "the app's user", counts)

    # On the loop.

    async def wait_member(self, opened: "asyncio.Future[None]") -> None:
        """Until the group has taken this process in; says where its user may be no member.

        Only who waits asks: a cluster that has had no group yet may leave that unanswered.
        """
        while not opened.done():
            await asyncio.wait({opened}, timeout=LOOK_S)
            if opened.done() or self._broker.health.is_away:
                continue
            try:
                seen = Look(barred=await asyncio.to_thread(self._barred))
            except BrokerError:
                continue
            if not opened.done():
                self._reading.tell(self._sentences(seen))
        self._reading.tell(())
        opened.result()

    def look_soon(self, astray: StreamdError | None = None) -> None:
        """Something is in the way, or a place cannot be read from: `astray` is why, if the
        topic is the one it was."""
        self._astray = astray or self._astray
        self._soon.set()

    async def watch(
        self,
        held: Callable[[], set[tuple[str, str]]],
        stop: Callable[[set[str]], None],
        give_back: Callable[[], None],
    ) -> None:
        """Look each few seconds, for ever; less often while all is as it was.

        Args:
            held: The sources as they were taken over, and their ids.
            stop: Called where some are gone: nothing more of them is to be read.
            give_back: Called where these are there again, or one was made anew meanwhile:
                what is held is to be given back and taken over again.

        Raises:
            StreamdError: A place is gone that was in a topic which is still the same.
        """
        before: set[str] = set()  # gone at the last look
        stopped: set[str] = set()
        pause_s = LOOK_S
        is_barred = False
        while True:
            was_told = await self._was_told(AGAIN_S if before or is_barred else pause_s)
            # Who may not be a member any more is told by its end as one.
            if (seen := await self._look_now(group=was_told or is_barred)) is None:
                continue
            is_barred = bool(seen.barred)
            pause_s = LOOK_S if was_told else min(pause_s * RARER, RARELY_S)
            missing = set(seen.gone) - self._matched
            gone, before = before & missing, missing
            seen.gone = sorted(gone)
            if lost := gone.intersection(self._sources) - stopped:
                stopped |= lost
                stop(lost)
            anew = {
                (name, topic.id)
                for name, topic in seen.found.items()
                if any(name == other and topic.id != id for other, id in held())
                and not (name in self._matched and topic.partitions != self.count)
            }
            texts = [*self._sentences(seen), *self._misshapen(seen, anew)]
            self._reading.tell(texts)
            if texts or before:
                pause_s = LOOK_S
                continue
            if stopped or anew - self._given_back:
                self._given_back |= anew
                stopped.clear()
                give_back()
            elif self._astray is not None and not anew:
                raise self._astray
            self._astray = None

    async def _was_told(self, pause_s: float) -> bool:
        """Wait for the next look; True: somebody wants it before its time."""
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(pause_s):
                await self._soon.wait()
        except TimeoutError:
            return False
        # A client may complain many times a second.
        await asyncio.sleep(began_at + AGAIN_S - time.monotonic())
        self._soon.clear()
        return True

    async def _look_now(self, *, group: bool) -> Look | None:
        if self._broker.health.is_away:
            return None
        try:
            seen = await asyncio.to_thread(look, self._broker.admin, self._needs)
            if group:
                seen.barred = await asyncio.to_thread(self._barred)
            return seen
        except BrokerError:
            return None

    def _misshapen(self, seen: Look, anew: set[tuple[str, str]]) -> list[str]:
        return [
            f"waits for topic {name!r}, which was made anew with {count} partitions: it had "
            f"{self.count}, make it so"
            for name, _ in sorted(anew)
            if (count := seen.found[name].partitions) != self.count
        ]
