"""Finding the process that has a key, and asking it; once more when it has just gone.

Streamd's own look-ups and the user's pages take the same way.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from streamd.errors import StreamdError
from streamd.link import LinkLost
from streamd.webgw.fleet import Fleet, NotReached
from streamd.webgw.hosts import NoSecret
from streamd.webgw.owners import route_partition
from streamd.webgw.replies import HttpError, not_now
from streamd.wire import (
    Found,
    LookupText,
    Message,
    Moved,
    Owner,
    RoutedKey,
    RouteKey,
    TableInfo,
    Unavailable,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

# How long a request waits for its key's next owner before it is tried once more.
RETRY_WAIT_S = 1.0

ONE_PARTITION = "group_by, or an agent that is sent to with key=, puts a key into one partition"


class NotDone(Exception):
    """The request was surely not done, or may be done twice: it can be sent again.

    Args:
        told: What the client gets if there is no further try.
        wait_s: How soon another try makes sense, without news of owners.
    """

    def __init__(self, told: HttpError, wait_s: float = RETRY_WAIT_S) -> None:
        super().__init__(str(told))
        self.told = told
        self.wait_s = wait_s


async def twice(fleet: Fleet, attempt: Callable[[], Awaitable[T]]) -> T:
    """Do `attempt`, and once more if it could not be done: then owners may be known better.

    Raises:
        HttpError: As `attempt` does, or 503.
    """
    known = fleet.owners
    try:
        return await attempt()
    except NotDone as error:
        wait_s = min(RETRY_WAIT_S, error.wait_s)
        fleet.hosts.doubt()
    await fleet.wait_owners(known, wait_s)
    try:
        return await attempt()
    except NotDone as error:
        raise error.told from error


async def ask(fleet: Fleet, owner: Owner, message: Message, *, repeatable: bool) -> Message:
    """Ask a process; its answer is what the message's kind has, nothing else.

    Args:
        repeatable: It may be done twice.

    Raises:
        NotDone: Ask again.
        HttpError: It was refused, or it is not known whether it was done.
    """
    try:
        answer = await fleet.ask(owner, message, None)
    except NotReached as error:
        told = not_now("owner_gone", f"{owner.process} is gone; another one takes its place")
        raise NotDone(told) from error
    except LinkLost as error:
        if repeatable:
            told = not_now("owner_lost", f"{owner.process} went away before it answered")
            raise NotDone(told) from error
        raise HttpError(
            502,
            "outcome_unknown",
            f"{owner.process} went away before it answered: the request may have been done",
        ) from error
    except StreamdError as error:
        log.warning("%s refused a %s: %s", owner.process, type(message).__name__, error)
        raise HttpError(500, "refused", str(error), hint=error.remedy) from error
    if isinstance(answer, Moved):
        told = not_now("moved", f"{owner.process} does not have the key's partition any more")
        raise NotDone(told)
    if isinstance(answer, Unavailable):
        told = not_now("unavailable", answer.reason, answer.retry_after_s)
        raise NotDone(told, answer.retry_after_s)
    return answer


def unexpected(owner: Owner, answer: Message) -> HttpError:
    log.error("%s answered with a %s", owner.process, type(answer).__name__)
    return HttpError(502, "bad_reply", f"{owner.process} gave an answer that makes no sense")


async def partition_of(fleet: Fleet, table: TableInfo, text: str) -> int:
    """The partition of a key as a URL writes it.

    Raises:
        HttpError: It is no key of this table.
        NotDone: The app has to be asked, and nobody is there.
    """
    try:
        partition = route_partition(table, text)
    except (ValueError, StreamdError) as error:
        raise bad_key(table, text, error) from error
    if partition is not None:
        return partition
    owner = member_of(fleet, table.group)
    try:
        answer = await ask(fleet, owner, RouteKey(table.name, text), repeatable=True)
    except HttpError as error:
        # All that the app can refuse here is the text.
        raise error if error.code != "refused" else bad_key(table, text, error) from error
    if not isinstance(answer, RoutedKey):
        raise unexpected(owner, answer)
    return answer.partition


async def holder_of(fleet: Fleet, table: TableInfo, text: str) -> tuple[Owner, int]:
    """The process that has the key, and the partition that it has it in.

    Of a scattered table every owner is asked who has the key; where nobody has it, it is the
    one that the key hashes to.

    Raises:
        HttpError: It is no key of this table, or several partitions have it (409).
        NotDone: Nobody who would know is there now.
    """
    partition = await partition_of(fleet, table, text)
    if not fleet.owners.is_scattered(table.name):
        return await owner_of(fleet, table.group, partition), partition
    await _check_all_here(fleet, table)
    members = fleet.owners.members(table.group)
    question = LookupText(table.name, text, -1)
    try:
        answers = await asyncio.gather(
            *(ask(fleet, owner, question, repeatable=True) for owner in members)
        )
    except HttpError as error:
        raise error if error.code != "refused" else several(table, text) from error
    found = [
        (owner, answer.partition)
        for owner, answer in zip(members, answers, strict=True)
        if isinstance(answer, Found)
    ]
    if len(found) > 1:
        raise several(table, text)
    if found:
        return found[0]
    return await owner_of(fleet, table.group, partition), partition


async def _check_all_here(fleet: Fleet, table: TableInfo) -> None:
    """See that no other host may have a key that could be in any partition."""
    if elsewhere := await fleet.hosts.elsewhere(table.group):
        raise not_now(
            "scattered",
            f"{table.name} has keys outside of the partition they hash to, and other hosts "
            f"have {len(elsewhere)} of its partitions",
            hint=ONE_PARTITION,
        )


def several(table: TableInfo, text: str) -> HttpError:
    """409: the key has no one value."""
    return HttpError(
        409,
        "scattered",
        f"{text!r} has a value in several partitions of {table.name}",
        hint=ONE_PARTITION,
    )


async def owner_of(fleet: Fleet, group: str, partition: int) -> Owner:
    """The process that has the partition, or the gateway of its host.

    Raises:
        NotDone: Nobody has it now.
        HttpError: Another host has it, which may not be asked.
    """
    owner = fleet.owners.owner(group, partition)
    if owner is not None:
        return owner
    next_owner = fleet.owners.recovering(group, partition)
    if next_owner is not None:
        raise NotDone(
            not_now(
                "recovering",
                f"{next_owner.process} recovers partition {partition} of {group}",
            )
        )
    try:
        host = await fleet.hosts.owner(group, partition)
    except NoSecret as error:
        raise not_now("no_token", str(error), hint=error.remedy) from error
    if host is not None:
        return host
    raise NotDone(not_now("no_owner", f"no process has partition {partition} of {group} now"))


def member_of(fleet: Fleet, group: str) -> Owner:
    """The process of the group with the lowest slot.

    Raises:
        NotDone: There is none now.
    """
    members = fleet.owners.members(group)
    if not members:
        raise NotDone(not_now("no_owner", f"no process of {group} runs now"))
    return members[0]


def bad_key(table: TableInfo, text: str, error: Exception) -> HttpError:
    """400: what the URL says is no key of the table."""
    return HttpError(400, "bad_key", f"{text!r} cannot be a key of {table.name}: {error}")
