"""What an app is, for the processes that do not import it. No I/O."""

import inspect
import sys
from typing import TYPE_CHECKING

from streamd import records, web, wire
from streamd.agents import Agent
from streamd.codecs import type_name
from streamd.groups import APP_GROUP
from streamd.tables import Table
from streamd.uses import uses_of

if TYPE_CHECKING:
    from streamd.app import App


def hello_of(app: "App", origin: str) -> wire.Hello:
    """All of a finalized app; `origin` is where it was found."""
    return wire.Hello(
        app_id=app.id,
        origin=origin,
        groups=[
            wire.GroupInfo(
                name=group.name,
                agents=[_agent_info(app, agent) for agent in group.agents],
                tables=[table.name for table in group.tables],
                processes=group.processes,
                why=group.why,
                auto=group.auto,
                restart=group.restart,
                max_memory_bytes=group.max_memory_bytes,
                nice=group.nice,
            )
            for group in app.groups
        ]
        + [wire.GroupInfo(APP_GROUP, [], [], 1, "tasks, timers, cron jobs and pages")],
        topics=topic_infos(app),
        tables=[_table_info(app, table) for table in app.tables.values()],
        timers=[
            wire.TimerInfo(
                name=timer.name,
                kind=timer.kind,
                group=timer.group,
                schedule=timer.schedule,
                zone=str(timer.cron.tz) if timer.cron is not None else "",
                on_leader=timer.on_leader,
            )
            for timer in app.timers
        ],
        routes=[
            wire.RouteInfo(
                id=page.id,
                path=page.path,
                methods=web.methods_of(page.view),
                name=page.name,
                group=page.group,
                table=page.table.name if page.table is not None else None,
                match_info=page.match_info,
                query_param=page.query_param,
                help=(inspect.getdoc(page.target) or "").partition("\n")[0],
            )
            for page in app.pages
        ],
        models=[
            wire.ModelInfo(model.__name__, records.describe(model), inspect.getdoc(model) or "")
            for model in _models(app)
        ],
        settings=app.settings.plain(),
        settings_shown=app.settings.shown(),
        warnings=list(app.warnings),
    )


def topic_infos(app: "App") -> list[wire.TopicInfo]:
    """Every topic that it reads or names, and that of its dead letters."""
    topics = dict(app.topics)
    for agent in app.agents.values():
        for topic in agent.channel.parts:
            topics.setdefault(topic.name, topic)
    infos = [
        wire.TopicInfo(
            name=topic.name,
            partitions=topic.partition_count,
            owned=topic.owned,
            retention_s=topic.retention_s,
            key_type=type_name(topic.key_type),
            value_type=type_name(topic.value_type),
            key_codec=topic.key_codec.name,
            value_codec=topic.value_codec.name,
            packed=topic.packed,
            replicas=topic.replicas or 0,
            compacting=bool(topic.compacting),
            deleting=topic.deleting,
            config=topic.config,
        )
        for topic in topics.values()
    ]
    return [*infos, wire.TopicInfo(app.dead_letters, 1, False, None, "", "")]


def _agent_info(app: "App", agent: Agent) -> wire.AgentInfo:
    used = uses_of(agent.fun, app.package)
    named = {other.channel.name for other in used.agents.values()} | {
        topic.name for topic in used.topics.values()
    }
    return wire.AgentInfo(
        name=agent.name,
        label=agent.label,
        topics=agent.get_topic_names(),
        concurrency=agent.concurrency,
        on_error=agent.on_error or app.settings.on_error,
        help=agent.help,
        sends=sorted(named - set(agent.get_topic_names())),
        tables=sorted(used.tables),
    )


def _table_info(app: "App", table: Table) -> wire.TableInfo:
    topic = app.route_topic(table)
    codec = topic.key_codec if topic is not None else table.key_codec
    return wire.TableInfo(
        name=table.name,
        group=table.group,
        partitions=table.partitions or 1,
        help=table.help,
        route_codec=codec.name,
        route_type=type_name(codec.type),
        key_type=type_name(table.key_type),
        value_type=type_name(table.value_type),
        key_codec=table.key_codec.name,
        value_codec=table.value_codec.name,
    )


def _models(app: "App") -> list[type[records.Record]]:
    topics = [*app.topics.values(), *(agent.channel for agent in app.agents.values())]
    types = [kind for topic in topics for kind in (topic.key_type, topic.value_type)]
    types += [kind for table in app.tables.values()
              for kind in (table.key_type, table.value_type)]  # fmt: skip
    module = sys.modules.get(app.module)
    types += list(vars(module).values()) if module is not None else []
    found = {
        kind.__name__: kind
        for kind in types
        if isinstance(kind, type)
        and issubclass(kind, records.Record)
        and kind is not records.Record
    }
    return list(found.values())
