"""`send`, `consume` and `table`: records and keys, one by one."""

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import click
import msgspec

from streamd.agentproc.broker.client import LogClient
from streamd.agentproc.broker.outside import log_of
from streamd.agents import Agent
from streamd.app import App
from streamd.cli import output, talk, target
from streamd.cli.control import complete_names
from streamd.cli.imported import import_app
from streamd.cli.look import Moment
from streamd.cli.options import given
from streamd.cli.root import Command
from streamd.codecs import Codec, codec_for
from streamd.errors import DecodeError, StreamdError, TableError, TimedOut, UsageError
from streamd.instance import Folder
from streamd.link import LinkLost, connect
from streamd.topics import Topic
from streamd.wire import (
    FetchedRecord,
    Found,
    LogTopic,
    LookupText,
    Message,
    Missing,
    Moved,
    Owner,
    Scan,
    Scanned,
    Unavailable,
)

SEND_AT_ONCE = 1000  # records sent before their places are printed
FETCH_RECORDS = 500
FETCH_WAIT_S = 1.0
TABLE_S = 5.0  # how long a table that recovers, or moves, is asked again
TABLE_RETRY_S = 0.05


def topic_of(app: App, entity: str) -> tuple[Topic, Agent | None]:
    """What `@agent` or `topic` means: the topic, and the agent if one was named.

    Raises:
        UsageError: The app has none of this name.
    """
    app.finalize()
    agents = list(app.agents.values())
    if entity.startswith("@"):
        for agent in agents:
            if entity[1:] in (agent.name, agent.label):
                return agent.channel, agent
        raise UsageError(
            f"no agent is named {entity[1:]!r}",
            seen=[f"there is @{agent.label}" for agent in agents],
        )
    topics = {topic.name: topic for topic in app.topics.values()}
    topics |= {agent.channel.name: agent.channel for agent in agents}
    if entity not in topics:
        raise UsageError(
            f"the app has no topic {entity!r}",
            seen=[f"there is {name}" for name in topics],
            remedy=f"@{entity}" if entity in [agent.label for agent in agents] else None,
        )
    return topics[entity], None


def send(
    entity: str,
    value: str | None,
    key: str | None,
    partition: int | None,
    repeat: int,
    wait: bool,
) -> None:
    """Send a message to an agent or topic.

    Prints where each one was placed, once it survives a loss of power.
    """
    app, _ = import_app(given(), as_running=True)
    topic, agent = topic_of(app, entity)
    if wait and agent is None:
        raise UsageError("only an agent replies", remedy="@AGENT, or without --wait")
    if wait and agent is not None and not agent.yields:
        raise UsageError(
            f"agent {agent.label!r} never replies: it yields nothing",
            remedy="yield the reply in the agent, or send without --wait",
        )
    if partition is not None and partition >= topic.partition_count:
        raise UsageError(
            f"{topic.name} has no partition {partition}: it has {topic.partition_count}"
        )
    texts = (line.rstrip("\n") for line in sys.stdin) if value == "-" else [value] * repeat
    values = (None if text is None else topic.value_codec.from_text(text) for text in texts)
    typed_key = None if key is None else topic.key_codec.from_text(key)
    if agent is not None and wait:
        asyncio.run(_ask(app, agent, typed_key, values))
    else:
        asyncio.run(_send(app, topic, typed_key, values, partition))


async def _send(
    app: App, topic: Topic, key: Any, values: Iterator[Any], partition: int | None
) -> None:
    pending: list[Any] = []
    async with app.client():
        for value in values:
            pending.append(await topic.send(key=key, value=value, partition=partition))
            if len(pending) >= SEND_AT_ONCE:
                await _say_places(pending)
        await _say_places(pending)


async def _say_places(pending: list[Any]) -> None:
    for sent in pending:
        placed = await sent
        if given().json:
            output.say_json(
                {"topic": placed.topic, "partition": placed.partition, "offset": placed.offset}
            )
        else:
            output.say(f"{placed.partition}@{placed.offset}")
    pending.clear()


async def _ask(app: App, agent: Agent, key: Any, values: Iterator[Any]) -> None:
    async with app.client():
        for value in values:
            reply = await agent.ask(value, key=key)
            output.say(json.dumps(msgspec.to_builtins(reply), ensure_ascii=False))


send_command = Command(
    "send",
    callback=send,
    help=send.__doc__,
    params=[
        click.Argument(["entity"], metavar="@AGENT|TOPIC"),
        click.Argument(
            ["value"],
            required=False,
            metavar="[VALUE]",
            help="JSON, or plain text for str values; - reads one a line from standard input.",
        ),
        click.Option(["-k", "--key"], metavar="KEY", help="JSON, or plain text for str keys."),
        click.Option(
            ["--partition"], type=click.IntRange(0), metavar="N", help="Send to this partition."
        ),
        click.Option(
            ["-r", "--repeat"],
            type=click.IntRange(1),
            default=1,
            show_default=True,
            metavar="N",
            help="Send it N times.",
        ),
        click.Option(["--wait"], is_flag=True, help="Wait for the agent's reply and print it."),
    ],
)


class Where(click.ParamType[Any]):
    """`start`, `end`, `-100` for the last ones, `15m` ago or an ISO time.

    Gives "start", "end", a negative int, or unix seconds as a float.
    """

    name = "where"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | int | float:
        if value in ("start", "end"):
            return str(value)
        if re.fullmatch(r"-\d+", str(value)):
            return int(value)
        return Moment().convert(value, param, ctx)


def consume(topic: str, start: str | int | float, limit: int | None) -> None:
    """Print messages of a topic as they come.

    Ends by itself after --limit messages, or at the topic's end where nothing runs that
    could write more.
    """
    asyncio.run(_consume(topic, start, limit))


async def _consume(name: str, start: str | int | float, limit: int | None) -> None:
    app, _ = import_app(given(), as_running=True)
    folder, datadir = target.folder_of(given()), app.settings.datadir
    assert datadir is not None
    key_codec, value_codec = _codecs(app, name)
    shown = 0
    async with log_of(app, folder, datadir.absolute()) as log:
        topics = {topic.name: topic for topic in await log.topics()}
        if name.startswith("@"):
            name = topic_of(app, name)[0].name
        if name not in topics:
            raise UsageError(
                f"the log has no topic {name!r}", seen=[f"there is {other}" for other in topics]
            )
        follow = target.living(folder) is not None
        if not follow:
            output.note(f"{folder.path.name} does not run: what is there is shown.")
        async for partition, record in read(log, topics[name], start, follow=follow):
            if limit is not None and shown >= limit:
                return
            _say_record(name, partition, record, key_codec, value_codec)
            shown += 1
            if limit is not None and shown >= limit:
                return


async def read(
    log: LogClient, topic: LogTopic, start: str | int | float, *, follow: bool
) -> AsyncIterator[tuple[int, FetchedRecord]]:
    """Records of all partitions, by time as far as they are there, then as they come."""
    there: list[tuple[int, FetchedRecord]] = []
    nexts = {partition: end for partition, (_, end) in enumerate(topic.ends)}
    if start != "end":
        for partition, (low, end) in enumerate(topic.ends):
            first = max(low, end + start) if isinstance(start, int) else low
            there += [
                (partition, each) for each in await _up_to(log, topic, partition, first, end)
            ]
        there.sort(key=lambda row: row[1].timestamp)
        if isinstance(start, int):
            there = there[start:]
        elif isinstance(start, float):
            there = [row for row in there if row[1].timestamp >= start]
    for row in there:
        yield row
    if not follow:
        return
    come: asyncio.Queue[tuple[int, FetchedRecord]] = asyncio.Queue(maxsize=FETCH_RECORDS)

    async def watch(partition: int, offset: int) -> None:
        index = 0
        while True:
            for record in await log.fetch(
                topic.name, partition, offset, FETCH_RECORDS, FETCH_WAIT_S, index
            ):
                await come.put((partition, record))
                offset, index = record.offset, record.index + 1

    watchers = [
        asyncio.create_task(watch(partition, offset), name=f"{topic.name}[{partition}]")
        for partition, offset in nexts.items()
    ]
    try:
        while True:
            getting = asyncio.ensure_future(come.get())
            await asyncio.wait([getting, *watchers], return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                # A watcher never returns: it raised, e.g. because the instance stopped.
                next(task for task in watchers if task.done()).result()
            yield getting.result()
    finally:
        for task in watchers:
            task.cancel()


async def _up_to(
    log: LogClient, topic: LogTopic, partition: int, offset: int, end: int
) -> list[FetchedRecord]:
    records: list[FetchedRecord] = []
    index = 0
    while offset < end:
        fetched = await log.fetch(topic.name, partition, offset, FETCH_RECORDS, 0.0, index)
        if not fetched:
            break
        records += [record for record in fetched if record.offset < end]
        offset, index = fetched[-1].offset, fetched[-1].index + 1
    return records


def _codecs(app: App, name: str) -> tuple[Codec, Codec]:
    try:
        topic, _ = topic_of(app, name)
    except UsageError:
        # One that streamd made, e.g. dead letters: shown as it is.
        raw = codec_for("raw", None, default="raw")
        return raw, raw
    return topic.key_codec, topic.value_codec


def _say_record(
    topic: str, partition: int, record: FetchedRecord, key_codec: Codec, value_codec: Codec
) -> None:
    if not given().json:
        key, value = _text(key_codec, record.key), _text(value_codec, record.value)
        output.say(f"{partition}@{record.offset}  {key}  {value}")
        return
    output.say_json(
        {
            "topic": topic,
            "partition": partition,
            "offset": record.offset,
            "timestamp": record.timestamp,
            "key": _plain(key_codec, record.key),
            "value": _plain(value_codec, record.value),
            "headers": {
                name: data.decode(errors="backslashreplace") for name, data in record.headers
            },
        }
    )


def _text(codec: Codec, data: bytes | None) -> str:
    if data is None:
        return "-"
    try:
        return codec.to_text(codec.decode(data))
    except StreamdError:
        # Not of the topic's type: shown as it is, for that is what one looks for.
        return data.decode(errors="backslashreplace")


def _plain(codec: Codec, data: bytes | None) -> Any:
    if data is None:
        return None
    try:
        return msgspec.to_builtins(codec.decode(data))
    except (DecodeError, TypeError):
        return data.decode(errors="backslashreplace")


consume_command = Command(
    "consume",
    callback=consume,
    help=consume.__doc__,
    params=[
        click.Argument(["topic"], metavar="@AGENT|TOPIC"),
        click.Option(
            ["--from", "start"],
            type=Where(),
            default="end",
            show_default=True,
            metavar="WHERE",
            help="end, start, -100, 15m or an ISO time.",
        ),
        click.Option(
            ["--limit"], type=click.IntRange(1), metavar="N", help="Stop after N messages."
        ),
    ],
)


def table(name: str, key: str | None, prefix: str, limit: int) -> int:
    """Look up a key of a table, or list keys.

    What is committed, asked of the processes that own it. A key without a value exits 1.
    """
    folder = target.folder_of(given())
    if key is None:
        return asyncio.run(_list_keys(folder, name, prefix, limit))
    return asyncio.run(_look_up(folder, name, key))


async def _look_up(folder: Folder, name: str, key: str) -> int:
    default = None
    # The key's own owner has it; without the codecs here, each owner looks.
    answers = await ask_owners(folder, name, LookupText(name, key, -1))
    found = [answer for answer in answers if isinstance(answer, Found)]
    if len(found) > 1:
        raise StreamdError(
            f"{key!r} has a value in {len(found)} partitions of {name}",
            seen=[f"partition {each.partition}: {each.value.decode()}" for each in found],
            remedy="let the events be keyed by the table's key: send them with key=",
        )
    if found:
        return _say_value(name, key, json.loads(found[0].value), found=True)
    for answer in answers:
        if isinstance(answer, Missing) and answer.default is not None:
            default = json.loads(answer.default)
    return _say_value(name, key, default, found=False)


def _say_value(name: str, key: str, value: Any, *, found: bool) -> int:
    if given().json:
        document = {"table": name, "key": key, "value": value, "found": found}
        output.say_json({"schema": "streamd.table/1", **document})
    elif found:
        output.say(json.dumps(value, ensure_ascii=False))
    else:
        default = "" if value is None else f"; its default is {json.dumps(value)}"
        output.note(f"{name} has no key {key!r}{default}")
    return 0 if found else 1


async def _list_keys(folder: Folder, name: str, prefix: str, limit: int) -> int:
    answers = await ask_owners(folder, name, Scan(name, prefix, limit))
    scanned = [answer for answer in answers if isinstance(answer, Scanned)]
    rows = sorted(row for answer in scanned for row in answer.rows)[:limit]
    total = sum(answer.total for answer in scanned)
    if given().json:
        output.say_json(
            {
                "schema": "streamd.table/1",
                "table": name,
                "rows": [
                    {"key": json.loads(key), "value": json.loads(value)} for key, value in rows
                ],
                "total": total,
            }
        )
        return 0
    output.say(output.columns(rows, ["key", "value"]))
    if total > len(rows):
        output.note(f"{output.count(total - len(rows))} more; see --limit and --prefix")
    return 0


async def ask_owners(folder: Folder, name: str, question: Message) -> Sequence[Message]:
    """The answer of every process that has a part of the table.

    Raises:
        UsageError: The app has no such table.
        TableError: No process has it now.
        TimedOut: It is not ready in time.
    """
    deadline = time.monotonic() + TABLE_S
    snapshot = await talk.ask(folder, "status")
    group = next((row["group"] for row in snapshot["tables"] if row["name"] == name), None)
    if group is None:
        raise UsageError(
            f"no table is named {name!r}",
            seen=[f"there is {row['name']}" for row in snapshot["tables"]],
        )
    while True:
        rows = (await talk.ask(folder, "owners"))["owners"]
        owners = [Owner(**row) for row in rows if row["group"] == group]
        answers = [await _ask_owner(owner, question) for owner in owners]
        missing = [answer for answer in answers if isinstance(answer, str)]
        if answers and not missing:
            return [answer for answer in answers if isinstance(answer, Message)]
        if time.monotonic() > deadline:
            if not owners:
                raise TableError(f"no process has {name} now", remedy="streamd status")
            raise TimedOut(
                f"{name} was not ready in {TABLE_S:g} s", seen=missing, remedy="streamd status"
            )
        await asyncio.sleep(TABLE_RETRY_S)


async def _ask_owner(owner: Owner, question: Message) -> Message | str:
    """The answer, or why there is none now."""
    try:
        link = await connect(owner.address, owner.process)
    except LinkLost as error:
        return str(error)
    try:
        answer = await link.request(question, TABLE_S)
    except LinkLost as error:
        return str(error)
    finally:
        link.close()
    if isinstance(answer, Unavailable):
        return f"{owner.process}: {answer.reason}"
    return f"{owner.process} does not have it any more" if isinstance(answer, Moved) else answer


table_command = Command(
    "table",
    callback=table,
    help=table.__doc__,
    params=[
        click.Argument(["name"], shell_complete=complete_names),
        click.Argument(["key"], required=False, help="JSON, or plain text for str keys."),
        click.Option(["--prefix"], default="", metavar="TEXT", help="Keys that begin so."),
        click.Option(
            ["--limit"],
            type=click.IntRange(1),
            default=20,
            show_default=True,
            metavar="N",
            help="At most this many keys.",
        ),
    ],
)
