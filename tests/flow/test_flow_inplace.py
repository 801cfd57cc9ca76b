"""With `debug`, a value of a table that is changed in place and not assigned is told."""

from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import pytest
from flowing import app_of, flow_test, running

from streamd.agentproc.routing import place_of
from streamd.app import App
from streamd.context import current_scope
from streamd.inplace import watch
from streamd.tables import Part, Table

TOLD = "was changed in place and not assigned, so the change is lost"


class Home:
    """A scope that is at home in the table's group."""

    def engine_name(self) -> str:
        return "here"


def watched(checked: bool) -> Table:
    app = App("t", broker="memory://")
    table = app.Table("lists", partitions=1, default=list)
    app.finalize()
    table.group = "here"
    table.hold({0: Part({})}, place_of(app, table), checked)
    watch(table)
    table.enter(0)
    return table


def append_to_default(table: Table) -> None:
    table["k"].append(1)


def append_after_assigning(table: Table) -> None:
    value = table["k"] = [1]
    value.append(2)


def append_to_what_get_gives(table: Table) -> None:
    table["k"] = [1]
    table.get("k").append(2)


def append_to_an_item(table: Table) -> None:
    table["k"] = [1]
    for _, value in table.items():
        value.append(2)


def assign_afterwards(table: Table) -> None:
    value = table["k"]
    value.append(1)
    table.enter(0)  # an await
    table["k"] = value


def only_read(table: Table) -> None:
    table["k"] = [1]
    assert table["k"] == [1] and table.get("k") == [1]


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize(
    ("code", "told"),
    [
        (append_to_default, 1),
        (append_after_assigning, 1),
        (append_to_what_get_gives, 1),
        (append_to_an_item, 1),
        (assign_afterwards, 0),
        (only_read, 0),
    ],
)
def test_it_is_told_once_at_the_checkpoint(
    code: Callable[[Table], None], told: int, checked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    table = watched(checked)

    def at_home() -> None:
        current_scope.set(Home())
        code(table)

    copy_context().run(at_home)
    assert TOLD not in caplog.text
    table.snapshot()
    table.landed()
    table.snapshot()

    assert caplog.text.count(TOLD) == told


def test_many_keys_are_counted_and_a_roll_back_forgets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = watched(False)
    for number in range(8):
        table[number].append(1)
    table.drop()
    table.snapshot()
    assert TOLD not in caplog.text

    for number in range(8):
        table[number].append(1)
    table.snapshot()

    assert caplog.text.count(TOLD) == 5
    assert "the same with 3 keys more" in caplog.text


@pytest.mark.parametrize("debug", [True, False])
def test_an_agents_slip_is_told_with_debug_alone(
    debug: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def build() -> App:
        app = app_of(debug=debug)
        words = app.topic("words", value_type=str)
        seen = app.Table("seen", default=list)

        @app.agent(words)
        async def note(stream: Any) -> None:
            async for word in stream:
                seen["all"].append(word)

        return app

    async def scenario() -> None:
        async with running(build) as flow:
            await flow.send("words", "a")
            await flow.settled()
            assert flow.table("seen") == {}

    flow_test(scenario)

    assert (TOLD in caplog.text) is debug
