"""The App: everything that a user's module declares, and what follows from it. No I/O."""

import copy
import inspect
import re
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from streamd import config, finder, patterns, web, wire
from streamd.agents import Agent, Replies, Sink, labels
from streamd.codecs import Codec, codec_for, type_name
from streamd.commands import AppCommand
from streamd.cron import Cron
from streamd.discovery import discover
from streamd.errors import AppError
from streamd.groups import (
    APP_GROUP,
    Group,
    home_of,
    place_partitions,
    refuse_foreign_writes,
    refuse_reserved,
    shared_globals,
    work_out,
)
from streamd.hello import hello_of, topic_infos
from streamd.tables import Table as TableObject
from streamd.topics import Topic
from streamd.uses import uses_of

Function = Callable[..., Any]


@dataclass
class Timer:
    """A task, a timer or a cron job."""

    name: str
    kind: str  # "task" | "timer" | "crontab"
    fun: Function
    interval_s: float  # of a timer
    cron: Cron | None  # of a cron job
    on_leader: bool
    group: str = APP_GROUP  # worked out when the app is complete
    names_zone: bool = True  # of a cron job; else its zone is the setting `timezone`

    @property
    def schedule(self) -> str:
        """When it runs, for people."""
        if self.kind == "timer":
            return f"every {self.interval_s:g} s"
        return self.cron.expr if self.cron is not None else "at start"


@dataclass
class Page:
    """A page, and the table whose owner its requests go to."""

    id: int
    path: str
    name: str
    view: type[web.View]
    table: TableObject | None
    match_info: str | None
    query_param: str | None
    target: Any  # what the user decorated
    group: str = APP_GROUP  # worked out when the app is complete


@dataclass(frozen=True)
class TableRoute:
    """What `@app.table_route` notes on a function for `@app.page` to find."""

    table: TableObject
    match_info: str | None
    query_param: str | None


class App:
    """A stream-processing app: the agents, tables, timers, pages and commands of one module.

    Args:
        id: Names the app's own topics and consumer groups; unique on a broker.
        settings: Any setting of `docs/settings.md`, e.g. `broker="kafka://host:9092"`. Options,
            environment (`STREAMD_BROKER`) and the settings file have a say as well:
            `streamd config` shows what came out and why.
    """

    __streamd_app__ = True

    def __init__(self, id: str, **settings: Any) -> None:
        if not id or any(character in id for character in "/\\\0 \t\n:#"):
            raise AppError(
                f"the app id {id!r} cannot name topics: letters, digits, '-', '_', '.'"
            )
        self.given_id = id
        self.keywords: dict[str, Any] = settings
        self.agents: dict[str, Agent] = {}  # by full name, in order of definition
        self.topics: dict[str, Topic] = {}
        self.tables: dict[str, TableObject] = {}
        self.timers: list[Timer] = []
        self.pages: list[Page] = []
        self.commands: dict[str, AppCommand] = {}
        self.groups: list[Group] = []  # worked out by `finalize`, sources first
        self.warnings: list[str] = []
        self.current_client: Any = None  # what sends outside of a scope
        self.open_replies: Callable[[], Awaitable[Replies]] | None = None
        self._replies: Replies | None = None
        self._settings: config.Settings | None = None
        self._finalized = False
        self.module = _calling_module()
        self.package = self.module.partition(".")[0]

    def __repr__(self) -> str:
        return f"<App {self.given_id}: {len(self.agents)} agents, {len(self.tables)} tables>"

    # Settings.

    @property
    def settings(self) -> config.Settings:
        """The settings as they came out of options, environment, App(...) and file."""
        if self._settings is None:
            self.configure({}, None, {})
        assert self._settings is not None
        return self._settings

    conf = settings

    def configure(
        self, environ: Mapping[str, str], file: Path | None, options: Mapping[str, str]
    ) -> config.Settings:
        """Work the settings out. Called once, before anything that depends on them.

        Raises:
            ConfigError: A setting has a value that cannot be used.
        """
        self._settings = config.resolve(
            {"id": self.given_id, **self.keywords}, environ, file, options
        )
        return self._settings

    def refuse_patterns(self) -> None:
        """See that topics are named by patterns on Kafka only.

        Raises:
            AppError: They are, on another broker.
        """
        found = [name for name in self.topics if patterns.is_pattern(name)]
        if found and config.broker_kind(self.settings.broker) != "kafka":
            raise AppError(
                f"app.topic(pattern={found[0].removeprefix(patterns.MARK)!r}) is read on Kafka "
                f"only, and the broker is {self.settings.broker!r}",
                remedy="name the topics: app.topic(name, name)",
            )

    @property
    def id(self) -> str:
        """The id of topics and groups: what was given, with `-v2` from version 2 on."""
        return self.settings.id

    # What a module declares.

    def topic(
        self,
        *names: str,
        key_type: type | None = None,
        value_type: type | None = None,
        key_serializer: str | Codec | None = None,
        value_serializer: str | Codec | None = None,
        partitions: int | None = None,
        retention: float | None = None,
        packed: bool | None = None,
        offset_reset: str | None = None,
        replicas: int | None = None,
        compacting: bool | None = None,
        deleting: bool | None = None,
        config: Mapping[str, Any] | None = None,
        pattern: str | None = None,
        **unused: Any,
    ) -> Topic:
        """Declare a topic; or several, which are read as one and sent to as the first.

        Args:
            value_type: What values become: str, int, a Record, any type msgspec knows;
                None: plain data.
            partitions: How many it gets where it is made; `topic_partitions` by default.
            retention: Seconds that records are kept; `topic_retention` by default.
            packed: On Kafka, several events travel as one record, which only streamd reads;
                by default so in the topics that the app owns.
            offset_reset: Where an agent begins that has never read it: earliest, latest or
                error; `consumer_auto_offset_reset` by default.
            replicas: On Kafka, its copies; `topic_replication_factor` by default.
            compacting: On Kafka, the last record of each key is kept.
            deleting: On Kafka, old records are deleted; by default where it is not compacting.
            config: On Kafka, further settings of the topic by their names there.
            pattern: On Kafka, instead of names: all topics whose whole name matches are read
                as one, also those that are made later; `partitions` is how many each has.
        """
        if pattern is not None:
            unmade = {
                "packed": packed, "retention": retention, "replicas": replicas,
                "compacting": compacting, "deleting": deleting, "config": config,
            }  # fmt: skip
            names = (_pattern_name(names, pattern, unmade),)
        if offset_reset not in (None, "earliest", "latest", "error"):
            raise AppError(
                f"topic {', '.join(names)!r} has offset_reset={offset_reset!r}: expected "
                "earliest, latest or error"
            )
        if not names:
            raise AppError("app.topic() needs a name")
        if len(names) > 1:
            return self._several(
                [
                    self.topic(
                        name, key_type=key_type, value_type=value_type,
                        key_serializer=key_serializer, value_serializer=value_serializer,
                        partitions=partitions, retention=retention, packed=packed,
                        offset_reset=offset_reset, replicas=replicas, compacting=compacting,
                        deleting=deleting, config=config, **unused,
                    )
                    for name in dict.fromkeys(names)
                ]
            )  # fmt: skip
        self._note_unused("topic", unused)
        if packed and compacting:
            raise AppError(
                f"topic {names[0]!r} is packed and compacting: a record of several events has "
                "no key to be compacted by",
                remedy="leave out packed=True",
            )
        if known := self.topics.get(names[0]):
            said = {
                "key_type": (key_type, known.key_type),
                "value_type": (value_type, known.value_type),
                "partitions": (partitions, known.partitions),
                "retention": (seconds_of(retention), known.retention_s),
                "packed": (packed, known.packed),
                "offset_reset": (offset_reset, known.offset_reset),
                "replicas": (replicas, known.replicas),
                "compacting": (compacting, known.compacting),
                "deleting": (deleting, known.deleting),
            }
            for keyword, (now, before) in said.items():
                if now is not None and now != before:
                    raise AppError(
                        f"topic {names[0]!r} is declared with {keyword} {_word(before)} and "
                        f"with {_word(now)}: one topic is declared in one way"
                    )
            return known
        topic = self._make_topic(
            names[0], key_type, value_type, key_serializer, value_serializer,
            partitions, retention, owned=False, packed=packed, offset_reset=offset_reset,
            replicas=replicas, compacting=compacting, deleting=deleting, config=config,
        )  # fmt: skip
        self.topics[topic.name] = topic
        return topic

    @overload
    def agent(self, channel: Function) -> Agent: ...

    @overload
    def agent(
        self, channel: Topic | str | None = None, **options: Any
    ) -> Callable[[Function], Agent]: ...

    def agent(
        self,
        channel: Topic | str | Function | None = None,
        *,
        name: str | None = None,
        concurrency: int = 1,
        deterministic: bool = True,
        sink: Iterable[Sink] = (),
        group: str | None = None,
        processes: int | str = 1,
        on_error: str | None = None,
        retries: int | None = None,
        timeout: float | None = None,
        restart: str | None = None,
        max_memory: int | None = None,
        nice: int | None = None,
        key_type: type | None = None,
        value_type: type | None = None,
        key_serializer: str | Codec | None = None,
        value_serializer: str | Codec | None = None,
        partitions: int | None = None,
        **unused: Any,
    ) -> Agent | Callable[[Function], Agent]:
        """Make an agent of an async function; see `streamd.agents.Agent`.

        `value_type` and the other codec arguments are for the agent's own topic, when it is
        given none.
        """
        if callable(channel) and not isinstance(channel, (Topic, str)):
            return self.agent()(channel)
        self._note_unused("agent", unused)
        of_topic = [
            keyword
            for keyword, value in {
                "key_type": key_type,
                "value_type": value_type,
                "key_serializer": key_serializer,
                "value_serializer": value_serializer,
                "partitions": partitions,
            }.items()
            if value is not None
        ]

        def decorate(fun: Function) -> Agent:
            full = name or f"{finder.canonical_module(fun.__module__)}.{fun.__name__}"
            if full in self.agents:
                raise AppError(f"two agents are named {full!r}: give one of them name=")
            topic = channel if isinstance(channel, Topic) else None
            if topic is not None and of_topic:
                raise AppError(
                    f"agent {full!r} is given topic {topic.name!r} and {of_topic[0]}=, which "
                    "says how its own topic would be",
                    remedy=f"give {of_topic[0]}= to app.topic(...)",
                )
            if isinstance(channel, str):
                topic = self.topic(
                    channel, key_type=key_type, value_type=value_type,
                    key_serializer=key_serializer, value_serializer=value_serializer,
                    partitions=partitions,
                )  # fmt: skip
            if topic is None:
                topic = self._make_topic(
                    full, key_type, value_type, key_serializer, value_serializer,
                    partitions, None, owned=True,
                )  # fmt: skip
            agent = Agent(
                self, fun, full, topic,
                concurrency=concurrency, deterministic=deterministic, sink=sink, group=group,
                processes=processes,
                on_error=on_error, retries=retries, timeout=timeout,
                restart=restart, max_memory=max_memory, nice=nice,
            )  # fmt: skip
            self.agents[full] = agent
            return agent

        return decorate

    actor = agent

    def Table(  # noqa: N802
        self,
        name: str,
        *,
        default: Callable[[], Any] | None = None,
        partitions: int | None = None,
        help: str = "",
        key_type: type | None = None,
        value_type: type | None = None,
        key_serializer: str | Codec | None = "json",
        value_serializer: str | Codec | None = "json",
        **unused: Any,
    ) -> TableObject:
        """Declare a table; see `streamd.tables.Table`."""
        if name in self.tables:
            raise AppError(
                f"two tables are named {name!r}: every table needs a name of its own"
            )
        self._note_unused("Table", unused)
        table = TableObject(
            self, name, default=default, partitions=partitions, help=help,
            key_type=key_type, value_type=value_type,
            key_codec=codec_for(key_serializer, key_type, default="json"),
            value_codec=codec_for(value_serializer, value_type, default="json"),
        )  # fmt: skip
        self.tables[name] = table
        return table

    def task(
        self, fun: Function | None = None, *, on_leader: bool = False, **unused: Any
    ) -> Any:
        """Run a function once, as soon as the app is fully operational."""
        self._note_unused("task", unused)
        if fun is None:
            return lambda fun: self._add_timer("task", fun, on_leader=on_leader)
        return self._add_timer("task", fun, on_leader=on_leader)

    def timer(
        self,
        interval: float,
        on_leader: bool = False,
        *,
        name: str | None = None,
        **unused: Any,
    ) -> Callable[[Function], Function]:
        """Run a function every `interval` seconds; the first time after one interval."""
        self._note_unused("timer", unused)
        seconds = interval.total_seconds() if hasattr(interval, "total_seconds") else interval
        if not isinstance(seconds, (int, float)) or not seconds > 0:
            raise AppError(f"app.timer({interval!r}): expected a number of seconds above 0")
        return lambda fun: self._add_timer(
            "timer", fun, on_leader=on_leader, interval_s=float(seconds), name=name
        )

    def crontab(
        self,
        cron_format: str,
        tz: Any = None,
        on_leader: bool = False,
        *,
        timezone: Any = None,
    ) -> Callable[[Function], Function]:
        """Run a function at the times of a cron expression.

        Args:
            tz: A zone: ZoneInfo, pytz, or its name; the setting `timezone` where left out.
            on_leader: Run in one process of the whole app only.

        Raises:
            ConfigError: The expression or the zone is wrong.
        """
        zone = tz if tz is not None else timezone
        cron = Cron(cron_format, zone)
        return lambda fun: self._add_timer(
            "crontab", fun, on_leader=on_leader, cron=cron, names_zone=zone is not None
        )

    def page(
        self,
        path: str,
        *,
        name: str | None = None,
        base: type[web.View] = web.View,
        **unused: Any,
    ) -> Callable[[Any], Any]:
        """Serve an async function or a View class under a path; `{x}` parts are match_info."""
        if not path.startswith("/"):
            raise AppError(f"the page path {path!r} does not begin with '/'")
        self._note_unused("page", unused)

        def decorate(target: Any) -> Any:
            route: TableRoute | None = getattr(target, "__streamd_route__", None)
            self.pages.append(
                Page(
                    id=self._page_id(path, name or target.__name__),
                    path=path,
                    name=name or target.__name__,
                    view=web.as_view(target),
                    table=route.table if route else None,
                    match_info=route.match_info if route else None,
                    query_param=route.query_param if route else None,
                    target=target,
                )
            )
            return target

        return decorate

    def table_route(
        self,
        table: TableObject,
        *,
        match_info: str | None = None,
        query_param: str | None = None,
        shard_param: str | None = None,
    ) -> Callable[[Function], Function]:
        """Send a page's requests to the process that holds the key of `table`.

        Args:
            match_info: The part of the path that is the key.
            query_param: The query parameter that is the key; one of the two is given.
        """
        query_param = query_param or shard_param
        if (match_info is None) == (query_param is None):
            raise AppError(
                "app.table_route() takes match_info= or query_param=, one of the two"
            )

        def decorate(fun: Function) -> Function:
            fun.__streamd_route__ = TableRoute(table, match_info, query_param)  # type: ignore[attr-defined]
            return fun

        return decorate

    def command(
        self, *options: Any, daemon: bool = False, **unused: Any
    ) -> Callable[[Function], Function]:
        """Make a command of the app's command line; options are click's."""

        def decorate(fun: Function) -> Function:
            command = AppCommand(self, fun, options, daemon=daemon)
            if command.name in self.commands:
                raise AppError(f"two commands are named {command.name!r}")
            self.commands[command.name] = command
            return fun

        if len(options) == 1 and inspect.iscoroutinefunction(options[0]):
            fun, options = options[0], ()
            # Used without parentheses: this is the decorated function already.
            return decorate(fun)
        return decorate

    # What a module does.

    async def send(self, channel: Topic | Agent | str, key: Any = None, value: Any = None,
                   **record: Any) -> Any:  # fmt: skip
        """Send to a topic, an agent, or a topic by name."""
        target = self.topic(channel) if isinstance(channel, str) else channel
        return await target.send(key=key, value=value, **record)

    @asynccontextmanager
    async def client(self) -> AsyncIterator["App"]:
        """Send, ask and look up from a script, without running anything.

        Raises:
            Busy: The embedded log is in use by a process that does not answer.
            BrokerError: The broker cannot be used.
        """
        # The one step up from the lowest room: what it opens belongs to the broker's room.
        from streamd.cli.client import open_client  # noqa: PLC0415

        async with open_client(self):
            yield self

    async def replies(self) -> Replies:
        """Where replies to this process come; opened at the first `ask`."""
        if self._replies is None:
            if self.open_replies is None:
                raise AppError("nothing runs that could receive a reply")
            self._replies = await self.open_replies()
        return self._replies

    def forget_replies(self) -> None:
        """The next `ask` opens them anew."""
        self._replies = None

    def expected_replies(self) -> Replies | None:
        """Where replies to this process come, if anything was asked yet."""
        return self._replies

    def main(self) -> None:
        """Be the `streamd` command for this app. Does not return."""
        from streamd.cli import main  # noqa: PLC0415

        main(app=self)

    # What follows from the declarations.

    def finalize(self) -> None:
        """Work out names, groups and where everything runs. May be called again.

        Raises:
            AppError: The declarations contradict each other.
        """
        if self._finalized:
            return
        self._finalized = True
        discover(self.settings.autodiscover, self.settings.app_origin or self.package)
        for timer in self.timers:
            if timer.cron is not None and not timer.names_zone:
                timer.cron = Cron(timer.cron.expr, self.settings.timezone)
        for name, label in labels(list(self.agents)).items():
            self.agents[name].label = label
        for agent in self.agents.values():
            if agent.channel.owned and agent.channel.name == agent.name:
                agent.channel.name = f"{self.id}-{agent.name}"
        for topic in [
            *self.topics.values(),
            *(agent.channel for agent in self.agents.values()),
        ]:
            topic.use_serializers(self.settings.key_serializer, self.settings.value_serializer)
        uses = {name: uses_of(agent.fun, self.package) for name, agent in self.agents.items()}
        pages = [(page, uses_of(page.target, self.package)) for page in self.pages]
        timers = [(timer, uses_of(timer.fun, self.package)) for timer in self.timers]
        others = [used for _, used in pages] + [used for _, used in timers]
        for page, used in pages:
            if page.table is not None:
                used.tables.setdefault(page.table.name, page.table)
        self.groups = work_out(
            list(self.agents.values()), list(self.tables.values()), uses, others
        )
        refuse_reserved(self.groups)
        for timer, used in timers:
            timer.group = home_of(used)
            refuse_foreign_writes(f"{timer.kind} {timer.name!r}", timer.group, used)
        for page, used in pages:
            page.group = page.table.group if page.table is not None else home_of(used)
            refuse_foreign_writes(f"page {page.path!r}", page.group, used)
        for name, agent in self.agents.items():
            refuse_foreign_writes(f"agent {name!r}", agent.group, uses[name])
        place_partitions(self.groups)
        self.warnings += shared_globals(self.agents, uses)

    def hello(self, origin: str, alone: bool) -> wire.Hello:
        """What the app is, for the processes that do not import it."""
        self.refuse_patterns()
        self.finalize()
        return hello_of(self, origin)

    def topic_infos(self) -> list[wire.TopicInfo]:
        """Every topic that it reads or names, and that of its dead letters."""
        return topic_infos(self)

    def route_topic(self, table: TableObject) -> Topic | None:
        """The topic whose keys decide where a key of `table` lives; None: it has no agent."""
        for group in self.groups:
            if table in group.tables and group.agents:
                return group.agents[0].channel
        return None

    @property
    def dead_letters(self) -> str:
        """The topic of the events that were given up."""
        return f"{self.id}-dead-letters"

    def _make_topic(
        self,
        name: str,
        key_type: type | None,
        value_type: type | None,
        key_serializer: str | Codec | None,
        value_serializer: str | Codec | None,
        partitions: int | None,
        retention: Any,
        owned: bool,
        packed: bool | None = None,
        **on_kafka: Any,
    ) -> Topic:
        for word, count in (("partitions", partitions), ("replicas", on_kafka.get("replicas"))):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise AppError(f"topic {name!r} has {word}={count!r}: expected 1 or more")
        return Topic(
            self, name,
            key_type=key_type, value_type=value_type,
            key_serializer=key_serializer, value_serializer=value_serializer,
            partitions=partitions, retention_s=seconds_of(retention), owned=owned,
            packed=packed, **on_kafka,
        )  # fmt: skip

    def _several(self, topics: list[Topic]) -> Topic:
        first = topics[0]
        for topic in topics:
            for word in ("key_type", "value_type", "partitions"):
                if getattr(topic, word) != getattr(first, word):
                    raise AppError(
                        f"topics {first.name!r} and {topic.name!r} are read as one, with "
                        f"{word} {_word(getattr(first, word))} and "
                        f"{_word(getattr(topic, word))}: expected the same",
                        remedy="an agent for each topic",
                    )
        together = copy.copy(first)
        together.parts = tuple(topics)
        return together

    def _page_id(self, path: str, name: str) -> int:
        """The same in every version of the app that has the page: during a reload the gateway
        asks old and new processes alike."""
        same = sum(page.path == path and page.name == name for page in self.pages)
        return zlib.crc32(f"{path} {name} {same}".encode()) & 0x7FFFFFFF

    def _add_timer(
        self,
        kind: str,
        fun: Function,
        *,
        on_leader: bool,
        interval_s: float = 0.0,
        cron: Cron | None = None,
        name: str | None = None,
        names_zone: bool = True,
    ) -> Function:
        if not inspect.iscoroutinefunction(fun):
            raise AppError(f"{kind} {fun.__name__!r} is not an async function")
        self.timers.append(
            Timer(
                name or fun.__name__, kind, fun, interval_s, cron, on_leader,
                names_zone=names_zone,
            )
        )  # fmt: skip
        return fun

    def _note_unused(self, what: str, unused: Mapping[str, Any]) -> None:
        for name in unused:
            self.warnings.append(
                f"{what}({name}=…) is taken for Faust's sake and has no effect"
            )


def seconds_of(span: Any) -> float | None:
    """A span of time, as a number of seconds or a timedelta, in seconds."""
    seconds: float | None = span.total_seconds() if hasattr(span, "total_seconds") else span
    return seconds


def _pattern_name(names: tuple[str, ...], pattern: str, unmade: dict[str, Any]) -> str:
    """The name of the topic that stands for those that match.

    Raises:
        AppError: It is none, or more is said of topics that the app does not make.
    """
    if names:
        raise AppError(
            f"app.topic() is given the name {names[0]!r} and the pattern {pattern!r}",
            remedy="one of them; a pattern may list names: a|b",
        )
    for word, value in unmade.items():
        if value is not None:
            raise AppError(
                f"app.topic(pattern={pattern!r}) has {word}={value!r}: topics that match are "
                "read as they are, and never made"
            )
    try:
        re.compile(pattern)
    except re.error as error:
        raise AppError(f"app.topic(pattern={pattern!r}) is no pattern: {error}") from None
    return patterns.MARK + pattern.removeprefix(patterns.MARK)


def _word(value: Any) -> str:
    return repr(type_name(value)) if isinstance(value, type) else repr(value)


def _calling_module() -> str:
    """The module that makes the App: the first frame outside of this file."""
    frame = sys._getframe(2)
    return str(frame.f_globals.get("__name__", "__main__"))
