"""A table is a dict, exactly, across checkpoints and roll-backs."""

import asyncio
from typing import Any

import pytest
from flowing import app_of, flow_test, running
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.agentproc.routing import place_of
from streamd.app import App
from streamd.context import current_scope
from streamd.errors import EncodeError, TableError
from streamd.records import Record
from streamd.tables import Checked, Foreign, Held, Part, Table


class Point(Record):
    x: int
    tags: list[str] = []


class Home:
    """A scope that is at home in group "here"."""

    def engine_name(self) -> str:
        return "here"


def held(checked: bool = False, partitions: int = 3, **declared: Any) -> Table:
    """A table that this process holds all of."""
    app = App("t", broker="memory://")
    table = app.Table("t", partitions=partitions, **declared)
    app.finalize()
    table.group = "here"
    table.hold({p: Part({}) for p in range(partitions)}, place_of(app, table), checked)
    return table


def checkpoint(table: Table, store: dict[int, dict[bytes, bytes]]) -> None:
    for partition, rows in table.snapshot():
        part = store.setdefault(partition, {})
        for key, data in rows:
            if data is None:
                part.pop(key, None)
            else:
                part[key] = data
    table.landed()


KEYS = st.sampled_from(["a", "b", "c", "d", "ö", ""])
PLAIN = st.one_of(st.integers(), st.text(max_size=3), st.none(), st.booleans())
VALUES = st.one_of(
    PLAIN,
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.text(max_size=2), PLAIN, max_size=2),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), KEYS, VALUES),
        st.tuples(st.just("del"), KEYS),
        st.tuples(st.just("pop"), KEYS),
        st.tuples(st.just("pop_default"), KEYS, VALUES),
        st.tuples(st.just("setdefault"), KEYS, VALUES),
        st.tuples(st.just("update"), st.dictionaries(KEYS, VALUES, max_size=3)),
        st.tuples(st.just("or"), st.dictionaries(KEYS, VALUES, max_size=3)),
        st.tuples(st.just("clear")),
        st.tuples(st.just("mutate"), KEYS),
        st.tuples(st.just("enter"), st.sampled_from([None, "key"]), KEYS),
        st.tuples(st.just("begin")),
        st.tuples(st.just("land")),
        st.tuples(st.just("drop")),
        st.tuples(st.just("reload")),
    ),
    max_size=40,
)


@pytest.mark.parametrize("checked", [False, True])
@settings(max_examples=300, deadline=None)
@given(steps=STEPS)
def test_a_held_table_is_a_dict(checked: bool, steps: list[tuple[Any, ...]]) -> None:
    token = current_scope.set(Home())
    try:
        play(held(checked, partitions=1), steps)
    finally:
        current_scope.reset(token)


def play(table: Table, steps: list[tuple[Any, ...]]) -> None:
    model: dict[Any, Any] = {}
    durable: dict[Any, Any] = {}
    flying: dict[Any, Any] | None = None
    store: dict[bytes, bytes] = {}
    table.enter(0)
    for name, *given_ in steps:
        key = given_[0] if given_ else None
        if name == "set":
            table[key] = model[key] = given_[1]
        elif name == "del":
            if key in model:
                del model[key], table[key]
            else:
                with pytest.raises(KeyError):
                    del table[key]
        elif name == "pop":
            if key in model:
                assert table.pop(key) == model.pop(key)
            else:
                with pytest.raises(KeyError):
                    table.pop(key)
        elif name == "pop_default":
            assert table.pop(key, given_[1]) == model.pop(key, given_[1])
        elif name == "setdefault":
            assert table.setdefault(key, given_[1]) == model.setdefault(key, given_[1])
        elif name == "update":
            table.update(given_[0], z=1)
            model.update(given_[0], z=1)
        elif name == "or":
            table |= given_[0]
            model |= given_[0]
        elif name == "clear":
            table.clear()
            model.clear()
        elif name == "mutate":
            value = table.get(key)
            if isinstance(value, list):
                value.append(99)
            elif isinstance(value, dict):
                value["99"] = 99
        elif name == "enter":
            table.enter(None if key is None else 0)
        elif name == "begin" and flying is None:
            for _, rows in table.snapshot():
                for data, value in rows:
                    if value is None:
                        store.pop(data, None)
                    else:
                        store[data] = value
            flying = dict(model)
        elif name == "land" and flying is not None:
            table.landed()
            durable, flying = flying, None
        elif name == "drop" and flying is None:
            table.drop()
            model = dict(durable)
        elif name == "reload" and flying is None:
            table.drop()
            model = dict(durable)
            part = Part(table.load(list(store.items())))
            table.hold({0: part}, table._place, isinstance(table, Checked))
            table.enter(0)
        agree(table, model)


def agree(table: Table, model: dict[Any, Any]) -> None:
    assert dict(table.items()) == model
    assert set(table) == set(table.keys()) == set(model)
    assert len(table) == len(model)
    assert table.copy() == model
    for key in ["a", "b", "c", "d", "ö", "", "z"]:
        assert (key in table) == (key in model)
        assert table.get(key, "none") == model.get(key, "none")
        if key in model:
            assert table[key] == model[key]
            assert table[key].__class__ is model[key].__class__
        else:
            with pytest.raises(KeyError):
                table[key]


@pytest.mark.parametrize("when", ["at once", "in flight", "after a checkpoint"])
@pytest.mark.parametrize(
    ("declared", "value", "change"),
    [
        ({}, [1], lambda v: v.append(2)),
        ({"default": list}, [1], lambda v: v.append(2)),
        ({"default": dict}, {"a": 1}, lambda v: v.update(b=2)),
        ({"value_type": list[int]}, [1], lambda v: v.append(2)),
        ({"value_type": Point}, Point(x=1), lambda v: v.tags.append("t")),
    ],
    ids=["untyped", "list", "dict", "typed", "record"],
)
def test_a_change_in_place_is_not_kept(
    when: str, declared: dict[str, Any], value: Any, change: Any
) -> None:
    table = held(**declared)
    before = table.value_codec.encode(value)
    table.enter(0)
    table["k"] = value
    if when == "in flight":
        table.snapshot()
    elif when == "after a checkpoint":
        checkpoint(table, {})

    change(value)
    change(table["k"])
    change(table.get("k"))
    change(next(iter(table.values())))

    assert table.value_codec.encode(table["k"]) == before
    if when == "at once":
        [(_, rows)] = table.snapshot()
        assert dict(rows)[b'"k"'] == before
    table.landed()
    assert table.committed("k", 0) == before


def test_values_and_keys_are_the_same_before_and_after_a_restart() -> None:
    table = held(partitions=1, default=int)
    table.enter(0)
    store: dict[int, dict[bytes, bytes]] = {}
    values = {("a", 1): 1.5, "b": None, "c": True, 7: "seven", "d": b"x".decode()}
    table.update(values)
    checkpoint(table, store)
    live = dict(table.items())
    again = held(partitions=1, default=int)
    again.hold({0: Part(again.load(list(store[0].items())))}, again._place, checked=False)

    assert dict(again.items()) == live == values


@pytest.mark.parametrize(
    ("declared", "key", "value"),
    [
        ({"value_type": int}, "k", "text"),
        ({"default": int}, "k", object()),
        ({}, "k", {1, object()}),
        ({"value_type": Point}, "k", [1]),
        ({"key_type": int}, "k", 1),
        ({}, b"k", 1),
        ({}, "\ud800", 1),
    ],
)
def test_what_would_not_come_back_is_refused(
    declared: dict[str, Any], key: Any, value: Any
) -> None:
    table = held(**declared)
    table.enter(0)
    with pytest.raises(EncodeError):
        table[key] = value
        table.check()
    table.drop()
    table["k" if declared.get("key_type") is None else 1] = (
        Point(x=1) if declared.get("value_type") is Point else 1
    )
    assert table.snapshot()


def test_deleting_is_kept_across_checkpoints() -> None:
    table = held()
    store: dict[int, dict[bytes, bytes]] = {}
    table.enter(0)
    table["k"] = 1
    checkpoint(table, store)
    table.enter(0)
    del table["k"]
    assert "k" not in table and table.get("k") is None and len(table) == 0
    table.snapshot()
    assert "k" not in table
    table["k"] = 2
    table.landed()
    assert table["k"] == 2
    checkpoint(table, store)
    assert store[0][b'"k"'] == b"2"


@pytest.mark.parametrize(
    "use",
    [
        lambda t: t["k"],
        lambda t: t.get("k"),
        lambda t: "k" in t,
        lambda t: t.__setitem__("k", 1),
        lambda t: t.__delitem__("k"),
        lambda t: t.pop("k"),
        lambda t: t.setdefault("k", 1),
        lambda t: t.update(k=1),
        lambda t: t.__ior__({"k": 1}),
        lambda t: t | {},
        lambda t: {} | t,
        lambda t: t.clear(),
        lambda t: list(t),
        lambda t: len(t),
        lambda t: t.items(),
        lambda t: t.values(),
        lambda t: t.keys(),
        lambda t: t.copy(),
        lambda t: t.popitem(),
        lambda t: list(reversed(t)),
        lambda t: dict(t),
    ],
)
def test_a_table_outside_of_an_app_refuses_every_use(use: Any) -> None:
    table = App("t", broker="memory://").Table("t", default=int)

    with pytest.raises(TableError, match="outside of a running app"):
        use(table)


class Owner:
    """The committed rows of another process."""

    rows = {b'"k"': b"5"}

    def get(self, table: str, key: bytes, partition: int) -> bytes | None:
        return self.rows.get(key)

    async def get_soon(self, table: str, key: bytes, partition: int) -> bytes | None:
        return self.rows.get(key)


def foreign() -> Table:
    table = App("t", broker="memory://").Table("t", default=int, partitions=2)
    table.group = "there"
    table.look_elsewhere(Owner(), lambda key: 0)
    return table


def test_a_foreign_table_is_read_at_its_owner() -> None:
    table = foreign()

    assert table["k"] == 5 and table["other"] == 0
    assert table.get("k") == 5 and table.get("other") is None
    assert "k" in table and "other" not in table
    assert asyncio.run(table.lookup("k")) == 5


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.__setitem__("k", 1),
        lambda t: t.__delitem__("k"),
        lambda t: t.pop("k"),
        lambda t: t.setdefault("new", 1),
        lambda t: t.update(k=1),
        lambda t: t.__ior__({"k": 1}),
    ],
)
@pytest.mark.parametrize("face", ["foreign", "checked"])
def test_a_write_from_another_group_names_the_cure(write: Any, face: str) -> None:
    if face == "foreign":
        table = foreign()
    else:
        table = held(checked=True, default=int)
        table._parts[table.place("k")].base["k"] = 1

    with pytest.raises(TableError, match="is written only there") as raised:
        write(table)
    assert "group=" in (raised.value.remedy or "")


def test_the_keys_of_a_foreign_table_cannot_be_listed() -> None:
    for use in (list, len, dict, Foreign.items, Foreign.values, Foreign.copy):
        with pytest.raises(TableError, match="cannot be listed here"):
            use(foreign())


def test_a_checked_table_shows_others_the_committed_value_only() -> None:
    table = held(checked=True, default=int, partitions=1)
    token = current_scope.set(Home())
    table.enter(0)
    table["k"] = 1
    checkpoint(table, {})
    table["k"] = 2
    table["new"] = 3
    assert table["k"] == 2
    current_scope.reset(token)

    assert table["k"] == 1 and table.get("k") == 1
    assert "new" not in table and table["new"] == 0
    assert dict(table.items()) == {"k": 1} and list(table) == ["k"] and len(table) == 1


def test_in_the_app_a_value_outlives_roll_backs_and_restarts() -> None:
    """Lists that agents assign, change in place, and assign again."""

    def build() -> App:
        app = app_of(topic_partitions=2)
        lists = app.Table("lists", default=list)
        tried: list[str] = []

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            async for word in stream:
                items = lists[word[0]]
                items.append(word)
                lists[word[0]] = items
                items.append("not kept")
                lists[word[0]].append("nor this")
                await asyncio.sleep(0)
                if word.endswith("5") and word not in tried:
                    tried.append(word)
                    raise RuntimeError(word)

        return app

    async def test() -> None:
        words = [f"{letter}{n}" for n in range(20) for letter in "abc"]
        async with running(build) as flow:
            for n, word in enumerate(words):
                await flow.send("work", word, key=word[0])
                if n == 30:
                    await flow.settled()
                    await flow.kill("work")
                    await flow.start("work")
            await flow.settled()

            assert flow.table("lists") == {
                letter: [f"{letter}{n}" for n in range(20)] for letter in "abc"
            }

    flow_test(test)


def test_a_scattered_table_keeps_each_value_where_its_events_are() -> None:
    def build() -> App:
        app = app_of(topic_partitions=4)
        counts = app.Table("counts", default=int)

        @app.agent(app.topic("in", value_type=str))
        async def count(stream: Any) -> None:
            async for word in stream:
                counts[word] += 1

        return app

    async def test() -> None:
        async with running(build) as flow:
            for n in range(40):
                await flow.send("in", f"w{n % 5}", partition=n % 4)
            await flow.settled()
            await flow.kill("count")
            await flow.start("count")
            for n in range(40):
                await flow.send("in", f"w{n % 5}", partition=n % 4)
            await flow.settled()

            for part in flow.parts("counts").values():
                assert part == {f"w{n}": 4 for n in range(5)}
            assert flow.engine("count").owns().scattered == ["counts"]

    flow_test(test)


def test_a_table_keyed_by_what_the_topic_cannot_write_works() -> None:
    def build() -> App:
        app = app_of(topic_partitions=4)
        counts = app.Table("counts", default=int)

        @app.agent(app.topic("in", value_type=int))  # its keys are raw
        async def count(stream: Any) -> None:
            async for number in stream:
                counts[number % 3, "x"] += 1
                counts[number % 3] += 1

        return app

    async def test() -> None:
        async with running(build) as flow:
            for n in range(30):
                await flow.send("in", n, key=str(n % 3))
            await flow.settled()

            total = flow.table("counts")
            assert total == {k: 10 for n in range(3) for k in (n, (n, "x"))}
            assert isinstance(flow.engine("count").tables[0], Held)

    flow_test(test)
