"""What changed between two imports of an app, and what of it cannot run beside the old.

Nothing here does I/O. Old and new processes run side by side while a reload is under way: they
read each other's events, and a slot's partitions and tables go from one to the other.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from streamd.errors import AppError
from streamd.wire import Hello, ModelInfo

# What the master has taken at its start, and cannot let go of while it runs.
FIXED_SETTINGS = ("broker", "datadir", "web_enabled", "web_bind", "web_port")

REMEDY = "streamd stop, then streamd start"


def refuse_what_cannot_run_beside(before: Hello, now: Hello) -> None:
    """Let `now` pass if its processes can run beside those of `before`.

    Raises:
        AppError: They cannot; the sentence names the first reason, `seen` all others.
    """
    reasons = list(_reasons(before, now))
    if reasons:
        raise AppError(
            f"the new code cannot run beside the old: {reasons[0]}; nothing was touched",
            seen=reasons[1:],
            remedy=REMEDY,
        )


def _reasons(before: Hello, now: Hello) -> Iterator[str]:
    if before.app_id != now.app_id:
        yield f"the app's id was {before.app_id!r} and is {now.app_id!r}"
    for name in FIXED_SETTINGS:
        old, new = before.settings.get(name), now.settings.get(name)
        if old != new:
            yield f"the setting {name} was {old!r} and is {new!r}"
    old_homes, new_homes = _homes(before), _homes(now)
    for what in old_homes:
        if what in new_homes and old_homes[what] != new_homes[what]:
            yield f"{what} moved from group {old_homes[what]!r} to {new_homes[what]!r}"
    yield from _changed("topic", _by_name(before.topics), _by_name(now.topics), TOPIC_PARTS)
    yield from _changed("table", _by_name(before.tables), _by_name(now.tables), TABLE_PARTS)
    used = _used_models(before) & _used_models(now)
    old_models, new_models = _by_name(before.models), _by_name(now.models)
    for name in sorted(used & old_models.keys() & new_models.keys()):
        yield from _changed_fields(old_models[name], new_models[name])


# Field of the frame -> what people call it.
TOPIC_PARTS = {
    "partitions": "partitions",
    "key_type": "key type",
    "value_type": "value type",
    "key_codec": "key codec",
    "value_codec": "value codec",
}
TABLE_PARTS = {**TOPIC_PARTS, "route_codec": "key codec of its topic"}


def _homes(hello: Hello) -> dict[str, str]:
    """Every agent and table, and the group it belongs to."""
    agents = {
        f"agent {agent.name}": group.name for group in hello.groups for agent in group.agents
    }
    return agents | {f"table {table.name}": table.group for table in hello.tables}


def _by_name(infos: Iterable[Any]) -> dict[str, Any]:
    return {info.name: info for info in infos}


def _changed(
    kind: str, before: Mapping[str, Any], now: Mapping[str, Any], parts: Mapping[str, str]
) -> Iterator[str]:
    for name, old in before.items():
        if name not in now:
            continue
        for part, word in parts.items():
            was, is_now = getattr(old, part), getattr(now[name], part)
            if was != is_now:
                yield f"{kind} {name!r}: {word} was {was or 'none'} and is {is_now or 'none'}"


def _used_models(hello: Hello) -> set[str]:
    """The record types that events, keys and rows are of, also inside of one another."""
    fields = {model.name: model.fields for model in hello.models}
    left = [text for topic in hello.topics for text in (topic.key_type, topic.value_type)]
    left += [text for table in hello.tables for text in (table.key_type, table.value_type)]
    found: set[str] = set()
    while left:
        for name in set(re.findall(r"\w+", left.pop())) & fields.keys() - found:
            found.add(name)
            left += [type for _, type, _ in fields[name]]
    return found


def _changed_fields(before: ModelInfo, now: ModelInfo) -> Iterator[str]:
    """A field that one side always reads and the other does not write, or of another type."""
    old = {name: (type, default) for name, type, default in before.fields}
    new = {name: (type, default) for name, type, default in now.fields}
    for name in old.keys() & new.keys():
        if old[name][0] != new[name][0]:
            yield f"record {now.name}: {name} was {old[name][0]} and is {new[name][0]}"
    for name in new.keys() - old.keys():
        if new[name][1] is None:
            yield f"record {now.name}: the new field {name} has no default"
    for name in old.keys() - new.keys():
        if old[name][1] is None:
            yield f"record {now.name}: the field {name} is gone, and the old code needs it"


def changes(before: Hello, now: Hello) -> list[str]:
    """What was added, removed or set otherwise, in lines for people."""
    lines = []
    for kind, old, new in _parts(before, now):
        for word, names in (("new", new - old), ("gone", old - new)):
            if names:
                lines.append(f"{word}: {kind} {', '.join(sorted(names))}")
    shown = {each.name: each.value for each in before.settings_shown}
    lines += [
        f"setting {each.name}: {shown[each.name]} -> {each.value}"
        for each in now.settings_shown
        if each.name in shown and shown[each.name] != each.value
    ]
    return lines


def _parts(before: Hello, now: Hello) -> Iterator[tuple[str, set[str], set[str]]]:
    def agents(hello: Hello) -> set[str]:
        return {agent.label for group in hello.groups for agent in group.agents}

    yield "group", {each.name for each in before.groups}, {each.name for each in now.groups}
    yield "agent", agents(before), agents(now)
    yield "topic", {each.name for each in before.topics}, {each.name for each in now.topics}
    yield "table", {each.name for each in before.tables}, {each.name for each in now.tables}
    yield "timer", {each.name for each in before.timers}, {each.name for each in now.timers}
    yield "page", {each.path for each in before.routes}, {each.path for each in now.routes}
