"""The receiving side: what another host's gateway, or an agent of this host, asks for.

A hop ends here: it is answered by a process of this host, or with `Moved`.
"""

import logging

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from streamd.errors import StreamdError, WireError
from streamd.link import Answer, Link, LinkLost
from streamd.webgw.asking import ONE_PARTITION
from streamd.webgw.client import Unreachable
from streamd.webgw.fleet import Fleet, NotReached
from streamd.webgw.gateway import read_body
from streamd.webgw.hosts import SIGNATURE, is_signed, sign
from streamd.webgw.options import FRAME_ROOM_BYTES
from streamd.webgw.replies import HttpError, not_now, reply
from streamd.wire import (
    Hop,
    Lookup,
    LookupText,
    Message,
    Missing,
    Moved,
    Owner,
    PageRequest,
    Refusal,
    Unavailable,
    decode_frame,
    encode_frame,
)

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0


class Hops:
    """See the module."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def from_host(self, request: Request) -> Response:
        """Another host's request; who has no key of ours learns nothing."""
        secret = self._fleet.options.token
        if not secret:
            raise not_now("no_token", "this host has no web_token: it answers no other host")
        body = await read_body(
            request.receive, self._fleet.options.max_body_bytes + FRAME_ROOM_BYTES
        )
        signature = request.headers.get(SIGNATURE, "")
        if not is_signed(signature, secret, body):
            log.warning("a look-up from %s is not signed with our web_token", request.client)
            raise HttpError(403, "bad_signature", "this is not signed with our web_token")
        answer = encode_frame(1, await self._answer(_hop_of(body)))
        proof = sign(secret, signature.encode(), answer)
        return reply(answer, "application/octet-stream", headers={SIGNATURE: proof})

    async def _answer(self, hop: Hop) -> Message:
        fleet = self._fleet
        if (hop.app_id, hop.gateway) != (fleet.app_id, fleet.hosts.gateway):
            raise HttpError(421, "misdirected", f"this is {fleet.app_id} on another gateway")
        message = decode_frame(hop.request)
        if not isinstance(message, PageRequest | Lookup | LookupText):
            raise HttpError(400, "bad_hop", f"a {type(message).__name__} is not taken here")
        owner = fleet.owners.owner(hop.group, hop.partition)
        if owner is None:
            if fleet.owners.recovering(hop.group, hop.partition) is not None:
                return Unavailable("recovering", RETRY_AFTER_S)
            return Moved(fleet.owners.generation)
        if isinstance(message, Lookup | LookupText):
            if fleet.owners.is_scattered(message.table):
                return Unavailable(f"{message.table} is scattered over hosts", RETRY_AFTER_S)
            owner = _reading(owner)
        try:
            return await fleet.ask(owner, message, None)
        except LinkLost as error:
            if isinstance(message, PageRequest) and not isinstance(error, NotReached):
                raise HttpError(502, "outcome_unknown", str(error)) from error
            return Unavailable(str(error), RETRY_AFTER_S)
        except StreamdError as error:
            return Refusal(str(error), error.seen, error.remedy, error.exit_code)

    async def from_agent(self, link: Link, message: Message) -> Answer:
        """A look-up of this host's agents that no process of this host could answer."""
        if not isinstance(message, Lookup) or message.table not in self._fleet.tables:
            raise WireError(f"unexpected {type(message).__name__} on {link.name}")
        group, hosts = self._fleet.tables[message.table].group, self._fleet.hosts
        if message.partition < 0:
            return await self._nowhere_else(group, message.table)
        owner = await hosts.owner(group, message.partition)
        if owner is None:
            hosts.doubt()
            return Moved(0)
        try:
            answer = await hosts.ask(owner, message)
        except (LinkLost, Unreachable) as error:
            answer = Unavailable(str(error), RETRY_AFTER_S)
        if isinstance(answer, Moved | Unavailable):
            hosts.doubt()
        return answer

    async def _nowhere_else(self, group: str, table: str) -> Message:
        if elsewhere := await self._fleet.hosts.elsewhere(group):
            raise StreamdError(
                f"a key of {table} may be in any partition, and other hosts have "
                f"{len(elsewhere)} of them",
                remedy=ONE_PARTITION,
            )
        return Missing(None)


def _reading(owner: Owner) -> Owner:
    # Where a thread answers: the loop may wait for an answer of the very host that asks.
    return msgspec.structs.replace(owner, address=f"{owner.address}.r")


def _hop_of(body: bytes) -> Hop:
    try:
        hop = decode_frame(body)
    except WireError as error:
        raise HttpError(400, "bad_hop", str(error)) from error
    if not isinstance(hop, Hop):
        raise HttpError(400, "bad_hop", f"a {type(hop).__name__} is no hop")
    return hop
