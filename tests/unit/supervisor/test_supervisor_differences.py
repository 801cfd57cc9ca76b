"""What changed between two imports, and what of it cannot run beside the old."""

from typing import Any

import msgspec
import pytest

from streamd.errors import AppError
from streamd.supervisor.differences import changes, refuse_what_cannot_run_beside
from streamd.supervisor.fleet import declaration
from streamd.wire import (
    AgentInfo,
    GroupInfo,
    Hello,
    ModelInfo,
    RouteInfo,
    SettingInfo,
    TableInfo,
    TimerInfo,
    TopicInfo,
)

COUNT = AgentInfo("proj.count", "count", ["words"], 1, "retry", "")
SPLIT = AgentInfo("proj.split", "split", ["lines"], 1, "retry", "")
WORDS = TopicInfo("words", 4, False, None, "str", "Word", "raw", "json")
COUNTS = TableInfo("counts", "count", 4, "", "raw", "str", "str", "int", "json", "json")
APP = GroupInfo("app", [], [], 1, "tasks")

BEFORE = Hello(
    app_id="proj",
    origin="proj:app",
    groups=[GroupInfo("count", [COUNT], ["counts"], 1, "one agent"), APP],
    topics=[WORDS],
    tables=[COUNTS],
    timers=[],
    routes=[],
    models=[
        ModelInfo("Word", [("text", "str", None), ("n", "int", "1")], ""),
        ModelInfo("Unused", [("text", "str", None)], ""),
    ],
    settings={"datadir": "/d", "broker": "embedded://", "topic_retention": 60.0},
    settings_shown=[SettingInfo("grace", "10s", "default")],
    warnings=[],
)


def but(**changed: Any) -> Hello:
    return msgspec.structs.replace(BEFORE, **changed)


def word(*fields: tuple[str, str, str | None]) -> list[ModelInfo]:
    return [ModelInfo("Word", list(fields), ""), BEFORE.models[1]]


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (but(app_id="other"), "the app's id was 'proj' and is 'other'"),
        (but(settings={**BEFORE.settings, "datadir": "/e"}), "the setting datadir was '/d'"),
        (
            but(groups=[GroupInfo("words", [COUNT], ["counts"], 1, ""), APP]),
            "agent proj.count moved from group 'count' to 'words'",
        ),
        (
            but(tables=[msgspec.structs.replace(COUNTS, group="app")]),
            "table counts moved from group 'count' to 'app'",
        ),
        (
            but(topics=[msgspec.structs.replace(WORDS, partitions=8)]),
            "topic 'words': partitions was 4 and is 8",
        ),
        (
            but(topics=[msgspec.structs.replace(WORDS, value_type="int")]),
            "topic 'words': value type was Word and is int",
        ),
        (
            but(topics=[msgspec.structs.replace(WORDS, value_codec="pickle")]),
            "topic 'words': value codec was json and is pickle",
        ),
        (
            but(tables=[msgspec.structs.replace(COUNTS, value_type="float")]),
            "table 'counts': value type was int and is float",
        ),
        (
            but(tables=[msgspec.structs.replace(COUNTS, key_codec="raw")]),
            "table 'counts': key codec was json and is raw",
        ),
        (
            but(models=word(("text", "str", None), ("n", "str", "'1'"))),
            "record Word: n was int and is str",
        ),
        (
            but(models=word(("text", "str", None), ("n", "int", "1"), ("x", "int", None))),
            "record Word: the new field x has no default",
        ),
        (but(models=word(("n", "int", "1"))), "record Word: the field text is gone"),
    ],
)
def test_what_cannot_run_beside_the_old_is_refused_by_name(now: Hello, text: str) -> None:
    with pytest.raises(AppError, match="nothing was touched") as refused:
        refuse_what_cannot_run_beside(BEFORE, now)

    assert text in str(refused.value)
    assert refused.value.exit_code == 78
    assert refused.value.remedy == "streamd stop, then streamd start"


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        (BEFORE, []),
        (
            but(
                groups=[GroupInfo("split", [SPLIT], [], 2, ""), *BEFORE.groups],
                topics=[WORDS, TopicInfo("lines", 2, False, None, "", "")],
            ),
            ["new: group split", "new: agent split", "new: topic lines"],
        ),
        (
            but(groups=[APP], topics=[], tables=[]),
            ["gone: group count", "gone: agent count", "gone: topic words",
             "gone: table counts"],
        ),
        (
            but(timers=[TimerInfo("tick", "timer", "app", "1s", "", False)]),
            ["new: timer tick"],
        ),
        (
            but(routes=[RouteInfo(1, "/n/", ["GET"], "n", "app", None, None, None, "")]),
            ["new: page /n/"],
        ),
        (
            but(settings_shown=[SettingInfo("grace", "5s", "file")]),
            ["setting grace: 10s -> 5s"],
        ),
        (but(models=word(("text", "str", None), ("n", "int", "1"), ("x", "int", "0"))), []),
        (but(models=word(("text", "str", None))), []),
        (but(models=[BEFORE.models[0], ModelInfo("Unused", [("n", "int", None)], "")]), []),
    ],
)  # fmt: skip
def test_what_can_run_beside_the_old_is_told_in_lines(now: Hello, lines: list[str]) -> None:
    refuse_what_cannot_run_beside(BEFORE, now)

    assert changes(BEFORE, now) == lines


def test_every_reason_but_the_first_is_told_too() -> None:
    now = but(app_id="other", topics=[msgspec.structs.replace(WORDS, partitions=8)])

    with pytest.raises(AppError) as refused:
        refuse_what_cannot_run_beside(BEFORE, now)

    assert refused.value.seen == ["topic 'words': partitions was 4 and is 8"]


def test_a_record_inside_another_is_looked_at_too() -> None:
    def with_inner(kind: str) -> Hello:
        return but(
            models=[
                ModelInfo("Word", [("inner", "list[Inner]", None)], ""),
                ModelInfo("Inner", [("n", kind, None)], ""),
            ]
        )

    with pytest.raises(AppError, match="record Inner: n was int and is str"):
        refuse_what_cannot_run_beside(with_inner("int"), with_inner("str"))


def test_while_both_run_the_log_knows_the_readers_of_both() -> None:
    now = but(
        groups=[GroupInfo("split", [SPLIT], [], 1, ""), APP],
        topics=[msgspec.structs.replace(WORDS, retention_s=5.0)],
        settings={**BEFORE.settings, "topic_retention": None},
    )

    told = declaration([BEFORE, now])

    assert [topic.retention_s for topic in told.topics] == [5.0]
    assert told.retention_s is None  # as the new code says
    assert {agent.name for group in told.groups for agent in group.agents} == {
        "proj.count", "proj.split"
    }  # fmt: skip
