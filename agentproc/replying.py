"""What becomes of a value that an agent yields: its sinks get it, and whoever asked."""

import asyncio
import inspect
import logging
import re
import time
from contextvars import Context
from typing import TYPE_CHECKING, Any

import msgspec

from streamd.agentproc.broker import TP, Broker, Checkpoint, Subscription
from streamd.agents import Agent, Replies
from streamd.app import App
from streamd.context import Lanes, Record
from streamd.topics import Topic

if TYPE_CHECKING:
    from streamd.agentproc.delivery import Actor

log = logging.getLogger(__name__)

MOST_ERROR_CHARACTERS = 10_000  # an error is told, whatever it quotes


class ReqRepResponse(msgspec.Struct):
    """A reply as Faust writes it, with the error of an agent that gave up."""

    key: Any
    value: Any
    correlation_id: str
    error: str | None = None


_encode = msgspec.json.Encoder().encode


async def reply(app: App, actor: "Actor", value: Any) -> None:
    """Pass a yielded value on; what leaves the process does so with the event's checkpoint."""
    for sink in actor.agent.sinks:
        await _pour(sink, value)
    reply_to, correlation = actor.reply_headers()
    if reply_to is None or correlation is None:
        return
    correlation_id = text_of(correlation)
    expected = app.expected_replies()
    if expected is not None and expected.expects(correlation_id):
        # The asker is in this process and may be in this group, whose checkpoint waits for it.
        expected.arrived(correlation_id, value)
        return
    topic = text_of(reply_to)
    data = _encode(ReqRepResponse(None, value, correlation_id))
    most_bytes = await actor.engine.session.most_bytes(topic)
    if len(data) > most_bytes:
        error = (
            f"the reply of agent {actor.agent.name!r} has {len(data)} bytes, and the cluster "
            f"takes {most_bytes}: send where it is kept, not what it is"
        )
        data = _encode(ReqRepResponse(None, None, correlation_id, error))
    if actor.has_tables and actor.engine.gate.asked.total():
        # The checkpoint waits for who asks, who may wait, over another group, for this reply.
        await actor.engine.send_now(topic, Record(0, None, data, None, []))
    else:
        _send(actor.lanes, topic, data)


def text_of(header: bytes) -> str:
    """A header's text; anybody may have written it, so it is read whatever it is."""
    return header.decode(errors="replace")


def refuse(app: App, lanes: Lanes, reply_to: str, correlation_id: str, error: str) -> None:
    """Tell whoever asked that the agent gave up on the event."""
    error = error[:MOST_ERROR_CHARACTERS]
    expected = app.expected_replies()
    if expected is not None and expected.expects(correlation_id):
        expected.arrived(correlation_id, None, error)
    else:
        _send(lanes, reply_to, _encode(ReqRepResponse(None, None, correlation_id, error)))


def _send(lanes: Lanes, reply_to: str, data: bytes) -> None:
    lane = lanes[reply_to][0]
    lane.keys.append(None)
    lane.values.append(data)


async def _pour(sink: Any, value: Any) -> None:
    if isinstance(sink, (Topic, Agent)):
        await sink.send(value=value)
        return
    outcome = sink(value)
    if inspect.isawaitable(outcome):
        await outcome


def reader_name(installation: str, process: str) -> str:
    """Who reads replies, in the letters that a topic's name may have (pure).

    >>> reader_name("", "app#0"), reader_name("a1b2", "app#0")
    ('app-0', 'a1b2-app-0')
    """
    name = f"{installation}-{process}" if installation else process
    return re.sub(r"[^a-zA-Z0-9._-]", "-", name)


async def receive(
    app: App, broker: Broker, process: str, tasks: set[asyncio.Task[None]]
) -> Replies:
    """Open the topic that replies to this process come to, and take them as they come."""
    group = f"reply-{reader_name(broker.installation, process)}"
    topic = f"{app.id}-{group}"
    session = broker.session(Subscription(app.id, group, 0, 1, {group: [topic]}, {}))
    await session.open()
    replies = Replies(topic)

    async def take() -> None:
        stored_at = time.monotonic()
        positions: dict[tuple[str, TP], int] = {}
        while True:
            for batch in await session.poll(1000):
                for data in batch.values:
                    if data is not None:
                        take_reply(replies, data)
                positions[group, batch.tp] = batch.end
            # Only what was taken is trimmed from the log; a crash in between costs nothing,
            # since nobody waits for what came before it.
            if time.monotonic() - stored_at > 1:
                await session.commit(Checkpoint(positions=dict(positions)))
                stored_at = time.monotonic()

    task = asyncio.get_running_loop().create_task(
        take(), name=f"{process} replies", context=Context()
    )
    tasks.add(task)
    return replies


def take_reply(replies: Replies, data: bytes) -> None:
    """Give a reply to whoever waits for it."""
    try:
        response = msgspec.json.decode(data, type=ReqRepResponse)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("a reply on %s cannot be read: %s", replies.topic, error)
    else:
        replies.arrived(response.correlation_id, response.value, response.error)
