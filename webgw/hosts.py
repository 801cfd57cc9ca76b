"""The other hosts of the app: which of them has a key, and asking its gateway, once.

The cluster's description of a group says which member has which partitions, and a member's
name where its host's gateway is. Only those addresses are ever asked. What is known is used for
some seconds, and asked for anew where it leads nowhere. A wrong map costs a try, never a wrong
answer: who does not have a partition says so.

Request and answer are frames. Both are signed with the secret that the hosts share, which is
itself never sent.
"""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from pathlib import Path

from streamd.errors import StreamdError, WireError
from streamd.instance import Folder
from streamd.link import Link, LinkLost, connect
from streamd.webgw.client import Silent, Unreachable, post
from streamd.wire import (
    Describe,
    Described,
    Hop,
    Message,
    Owner,
    Site,
    Unavailable,
    decode_frame,
    encode_frame,
)

log = logging.getLogger(__name__)

HOP_PATH = "/streamd/hop"
SIGNATURE = "x-streamd-signature"

KNOWN_S = 5.0  # how long a description is used
AGAIN_S = 0.2  # the least time between two
FAILED_AGAIN_S = 3.0  # the same after one in vain, for which no page waits
SILENT_S = 3.0  # a gateway from which nothing came back is not tried for so long
DESCRIBE_S = 3.0
RETRY_AFTER_S = 1.0
REFUSED = frozenset({400, 403, 405, 408, 413, 421, 503})  # nothing was done

SCHEME = "http://"


def sign(secret: str, *parts: bytes) -> str:
    """What shows that the parts come from a host that knows the secret."""
    return hmac.new(secret.encode(), b"".join(parts), hashlib.sha256).hexdigest()


def is_signed(given: str, secret: str, *parts: bytes) -> bool:
    """Is `given` the signature of the parts?"""
    return hmac.compare_digest(given.encode(), sign(secret, *parts).encode())


class NoSecret(StreamdError):
    """Another host has what was asked for, and hosts share no secret."""


class _Group:
    """Who has what of one group, as of a moment."""

    def __init__(self) -> None:
        self.owners: dict[int, str] = {}  # partition -> gateway
        self.asked_at = float("-inf")
        self.failed_at = float("-inf")  # when the cluster did not say; -inf: it said, last
        self.lock = asyncio.Lock()
        self.asking: asyncio.Task[None] | None = None  # for which nobody waits


class Hosts:
    """See the module."""

    def __init__(self, secret: Callable[[], str]) -> None:
        self._secret = secret
        self.tell: Callable[[str], None] | None = None  # the master, once
        self.gateway = ""  # our own
        self._app_id = ""
        self._log: Path | None = None  # where the cluster is asked; None: there is none
        self._link: Link | None = None
        self._groups: dict[str, _Group] = {}
        self._silent_at: dict[str, float] = {}  # gateway -> monotonic

    def take_site(self, site: Site) -> None:
        """Know who we are."""
        self.gateway, self._app_id = site.gateway, site.app_id
        if str(site.settings.get("broker", "")).startswith("kafka"):
            self._log = Folder(Path(site.runtime_dir)).log_path

    @property
    def are_there(self) -> bool:
        """May the app run on other hosts too?"""
        return self._log is not None

    async def owner(self, group: str, partition: int) -> Owner | None:
        """The gateway of the host that has a partition, as an owner; None: no other host.

        Raises:
            NoSecret: There is one, and it may not be asked.
        """
        if self._log is None:
            return None
        known = self._groups.setdefault(group, _Group())
        if partition not in known.owners or time.monotonic() - known.asked_at > KNOWN_S:
            await self._know(group, known)
        gateway = known.owners.get(partition, "")
        if gateway in ("", self.gateway):
            return None
        if not self._secret():
            refused = NoSecret(
                f"partition {partition} of {group} is on the host {gateway}, and hosts ask "
                "each other only with a secret that they share",
                remedy="set web_token, the same on every host",
            )
            if self.tell is not None:
                self.tell(f"{refused}: {refused.remedy}")
                self.tell = None
            raise refused
        return Owner(group, f"the host {gateway}", SCHEME + gateway, -1, 0, [partition], [])

    async def elsewhere(self, group: str) -> list[int]:
        """The partitions of a group that other hosts have."""
        if self._log is None:
            return []
        known = self._groups.setdefault(group, _Group())
        await self._know(group, known)
        return [at for at, gateway in known.owners.items() if gateway != self.gateway]

    def doubt(self) -> None:
        """What is known led nowhere: ask the cluster before it is used again."""
        for group in self._groups.values():
            group.asked_at = min(group.asked_at, time.monotonic() - KNOWN_S)

    async def _know(self, group: str, known: _Group) -> None:
        """Ask the cluster; where it did not say when it was asked last, do not wait for it."""
        if known.failed_at < 0:
            await self._ask_cluster(group, known)
        elif known.asking is None or known.asking.done():
            if time.monotonic() - known.failed_at >= FAILED_AGAIN_S:
                known.asking = asyncio.create_task(self._ask_cluster(group, known))

    async def _ask_cluster(self, group: str, known: _Group) -> None:
        asked_at = time.monotonic()
        async with known.lock:
            if max(known.asked_at + AGAIN_S, known.failed_at) >= asked_at:
                return  # somebody else has asked meanwhile, or just before
            try:
                answer = await self._described(group)
            except StreamdError as error:
                if known.failed_at < 0:
                    log.warning("who has what of %s is not known: %s", group, error)
                known.failed_at = time.monotonic()
                return
            known.asked_at, known.failed_at = asked_at, float("-inf")
            if answer.settled:
                known.owners = {
                    partition: member.gateway
                    for member in answer.members
                    for partition in member.partitions
                }

    async def _described(self, group: str) -> Described:
        assert self._log is not None
        if self._link is None or self._link.closed.is_set():
            self._link = await connect(self._log, "the process log")
        answer = await self._link.request(Describe(group), DESCRIBE_S)
        if not isinstance(answer, Described):
            raise WireError(f"the process log answered with a {type(answer).__name__}")
        return answer

    async def ask(self, owner: Owner, message: Message) -> Message:
        """Ask the gateway of another host; its process's answer.

        Raises:
            Unreachable: It was not asked.
            LinkLost: It went away, or answered with nonsense; it may have been done.
        """
        gateway = owner.address.removeprefix(SCHEME)
        request = encode_frame(1, message)
        hop = Hop(self._app_id, gateway, owner.group, owner.active[0], request)
        body = encode_frame(1, hop)
        signature = sign(self._secret(), body)
        if time.monotonic() - self._silent_at.get(gateway, float("-inf")) < SILENT_S:
            raise Unreachable(f"nothing came back from {gateway} a moment ago")
        try:
            status, headers, answer = await post(
                gateway, HOP_PATH, body, {SIGNATURE: signature}
            )
        except Silent:
            self._silent_at[gateway] = time.monotonic()
            raise
        self._silent_at.pop(gateway, None)
        if status in REFUSED:
            log.warning("%s refused a look-up: %d %.200r", owner.process, status, answer)
            return Unavailable(f"{owner.process} refused: status {status}", RETRY_AFTER_S)
        proof = headers.get(SIGNATURE, "")
        if status != 200 or not is_signed(proof, self._secret(), signature.encode(), answer):
            raise LinkLost(f"{owner.process} answered with status {status}, without our secret")
        return decode_frame(answer)
