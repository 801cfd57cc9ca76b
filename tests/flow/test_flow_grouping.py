"""Which agents run together, and what a declaration is refused or warned for."""

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flowing import app_of

from streamd import web
from streamd.app import App
from streamd.errors import AppError
from streamd.groups import RESERVED
from streamd.uses import uses_of

PACKAGE = __name__


def declared() -> App:
    app = app_of()
    app.module = app.package = PACKAGE
    return app


def groups_of(app: App) -> dict[str, list[str]]:
    app.finalize()
    return {group.name: [agent.label for agent in group.agents] for group in app.groups}


def test_agents_that_share_a_table_share_a_group() -> None:
    app = declared()
    a, b = app.Table("a", default=int), app.Table("b", default=int)

    @app.agent()
    async def first(stream: Any) -> None:
        a["x"] = 1

    @app.agent()
    async def second(stream: Any) -> None:
        b["x"] = 1

    @app.agent()
    async def bridge(stream: Any) -> None:
        a["x"] = b["x"] = 1

    @app.agent()
    async def apart(stream: Any) -> None:
        await bridge.send(value=1)

    assert groups_of(app) == {"apart": ["apart"], "first": ["first", "second", "bridge"]}
    assert "share" in next(g.why for g in app.groups if g.name == "first")
    assert a.group == b.group == "first"


def test_group_names_win_and_sources_come_first() -> None:
    app = declared()

    @app.agent(group="g", processes=2)
    async def sink(stream: Any) -> None: ...

    @app.agent(processes=3)
    async def source(stream: Any) -> None:
        await sink.send(value=1)

    @app.agent(group="g", processes=5)
    async def other(stream: Any) -> None: ...

    assert groups_of(app) == {"source": ["source"], "g": ["sink", "other"]}
    assert [group.processes for group in app.groups] == [3, 5]


def test_a_reader_in_another_group_reads_at_the_owner() -> None:
    app = declared()
    a = app.Table("a", default=int)

    @app.agent()
    async def writer(stream: Any) -> None:
        a["x"] = 1

    @app.agent(group="readers")
    async def reader(stream: Any) -> None:
        print(a["x"])  # noqa: T201

    assert groups_of(app) == {"writer": ["writer"], "readers": ["reader"]}
    assert a.group == "writer"


def test_two_groups_that_write_one_table_are_refused_with_the_cure() -> None:
    app = declared()
    a = app.Table("a", default=int)

    @app.agent(group="one")
    async def first(stream: Any) -> None:
        a["x"] = 1

    @app.agent(group="two")
    async def second(stream: Any) -> None:
        del a["x"]

    with pytest.raises(AppError, match="'a' is written in 2 groups") as raised:
        app.finalize()
    assert "group=" in (raised.value.remedy or "")


def test_timers_and_pages_run_where_their_one_table_is() -> None:
    app = declared()
    a, b = app.Table("a", default=int), app.Table("b", default=int)
    lone = app.Table("lone", default=int)

    @app.agent()
    async def first(stream: Any) -> None:
        a["x"] = 1

    @app.agent()
    async def second(stream: Any) -> None:
        b["x"] = 1

    @app.timer(1.0)
    async def writes() -> None:
        a["y"] = 2

    @app.timer(1.0)
    async def reads_both() -> None:
        print(a["y"], b["x"])  # noqa: T201

    @app.task
    async def neither() -> None: ...

    @app.crontab("* * * * *")
    async def own() -> None:
        lone["x"] = 1

    @app.page("/a/")
    async def page(self: Any, request: Any) -> Any:
        return self.json(a["x"])

    @app.page("/b/{key}/")
    @app.table_route(b, match_info="key")
    async def routed(self: Any, request: Any, key: str) -> Any:
        return self.json(a["x"])

    app.finalize()
    assert {timer.name: timer.group for timer in app.timers} == {
        "writes": "first", "reads_both": "app", "neither": "app", "own": "lone",
    }  # fmt: skip
    assert {page.path: page.group for page in app.pages} == {
        "/a/": "first",
        "/b/{key}/": "second",
    }
    assert [group.name for group in app.groups if not group.agents] == ["lone"]


@pytest.mark.parametrize("kind", ["timer", "page"])
def test_a_write_to_several_groups_tables_is_refused_with_the_cure(kind: str) -> None:
    app = declared()
    a, b = app.Table("a", default=int), app.Table("b", default=int)

    @app.agent()
    async def first(stream: Any) -> None:
        a["x"] = 1

    @app.agent()
    async def second(stream: Any) -> None:
        b["x"] = 1

    async def tick() -> None:
        a["x"] = b["x"]

    async def view(self: Any, request: Any) -> None:
        a["x"] = b["x"]

    if kind == "timer":
        app.timer(1.0)(tick)
    else:
        app.page("/both/")(view)
    with pytest.raises(AppError, match="writes table 'a'") as raised:
        app.finalize()
    assert "group='first'" in (raised.value.remedy or "")


@pytest.mark.parametrize("name", RESERVED)
def test_names_of_streamds_processes_are_refused(name: str) -> None:
    app = declared()

    @app.agent(group=name)
    async def work(stream: Any) -> None: ...

    with pytest.raises(AppError, match="cannot be named"):
        app.finalize()


def test_two_agents_of_one_name_are_refused() -> None:
    app = declared()

    @app.agent(name="x")
    async def first(stream: Any) -> None: ...

    with pytest.raises(AppError, match="two agents are named 'x'"):

        @app.agent(name="x")
        async def second(stream: Any) -> None: ...


def test_agents_whose_last_parts_are_equal_keep_their_whole_names() -> None:
    app = declared()

    @app.agent(name="a.work")
    async def first(stream: Any) -> None: ...

    @app.agent(name="b.work")
    async def second(stream: Any) -> None: ...

    assert groups_of(app) == {"a.work": ["a.work"], "b.work": ["b.work"]}


def test_topics_of_a_group_with_tables_have_one_partition_count() -> None:
    app = declared()
    a = app.Table("a", default=int)

    @app.agent(app.topic("four", partitions=4))
    async def first(stream: Any) -> None:
        a["x"] = 1

    @app.agent(app.topic("two", partitions=2))
    async def second(stream: Any) -> None:
        a["x"] = 1

    with pytest.raises(AppError, match="four has 4, two has 2"):
        app.finalize()


SHARED: dict[str, int] = {}
LIMIT = 5


def test_mutable_globals_that_groups_share_are_warned_of() -> None:
    app = declared()

    @app.agent()
    async def first(stream: Any) -> None:
        SHARED["x"] = LIMIT

    @app.agent()
    async def second(stream: Any) -> None:
        print(SHARED, LIMIT)  # noqa: T201

    app.finalize()
    [warning] = app.warnings
    assert "SHARED" in warning and "first" in warning and "second" in warning


def test_a_global_is_no_warning_within_one_group() -> None:
    app = declared()

    @app.agent(group="g")
    async def first(stream: Any) -> None:
        SHARED["x"] = 1

    @app.agent(group="g")
    async def second(stream: Any) -> None:
        SHARED["x"] = 2

    app.finalize()
    assert app.warnings == []


# What a function uses.

APP = App("uses", broker="memory://")
COUNTS = APP.Table("counts", default=int)
OTHER = APP.Table("other", default=int)
count = APP.Table("table named count", default=int)


def write_counts(key: str) -> None:
    COUNTS[key] += 1


def wrap(fun: Callable[..., Any]) -> Callable[..., Any]:
    import functools  # noqa: PLC0415

    @functools.wraps(fun)
    def wrapper(*args: Any) -> Any:
        OTHER["wrapped"] = 1
        return fun(*args)

    return wrapper


class Base(web.View):
    async def post(self, request: Any) -> Any:
        COUNTS.update(a=1)


class Derived(Base):
    async def get(self, request: Any) -> Any:
        return OTHER["x"]


class Helper:
    def method(self) -> int:
        return int(COUNTS["x"])

    @staticmethod
    def static() -> None:
        del OTHER["x"]

    @property
    def size(self) -> int:
        return len(COUNTS)


@pytest.fixture
def tables_module() -> Iterator[types.ModuleType]:
    """A package of the app with its tables in a module."""
    package = types.ModuleType(f"{PACKAGE}_tables")
    inner = types.ModuleType(f"{PACKAGE}_tables.inner")
    inner.COUNTS = COUNTS  # type: ignore[attr-defined]
    package.inner = inner  # type: ignore[attr-defined]
    sys.modules[package.__name__] = package
    sys.modules[inner.__name__] = inner
    globals()["tables"] = package
    yield package
    del sys.modules[package.__name__], sys.modules[inner.__name__], globals()["tables"]


def used(target: Any) -> tuple[set[str], set[str]]:
    uses = uses_of(target, PACKAGE)
    return set(uses.tables), uses.written


def test_uses_follows_helpers_and_closures() -> None:
    inner = OTHER

    def agent() -> None:
        write_counts("x")
        inner.pop("x")

    assert used(agent) == ({"counts", "other"}, {"counts", "other"})


def test_uses_sees_comprehensions_lambdas_and_nested_functions() -> None:
    def agent() -> Any:
        def nested() -> Any:
            return [COUNTS[k] for k in "ab"]

        return nested, lambda: OTHER["x"]

    assert used(agent) == ({"counts", "other"}, set())


def test_uses_sees_tables_in_modules(tables_module: types.ModuleType) -> None:
    def agent() -> None:
        tables.inner.COUNTS["x"] = 1  # type: ignore[name-defined]  # noqa: F821

    assert used(agent) == ({"counts"}, {"counts"})


def test_uses_sees_what_is_imported_inside_the_function(
    tables_module: types.ModuleType,
) -> None:
    source = f"def agent():\n from {PACKAGE}_tables.inner import COUNTS\n COUNTS['x'] = 1\n"
    space: dict[str, Any] = {"__name__": PACKAGE}
    exec(source, space)  # noqa: S102

    assert used(space["agent"])[0] == {"counts"}


def test_uses_sees_a_wrapper_and_what_it_wraps() -> None:
    @wrap
    def agent() -> None:
        write_counts("x")

    assert used(agent) == ({"counts", "other"}, {"counts", "other"})


def test_uses_sees_every_method_of_a_view_and_of_its_bases() -> None:
    assert used(Derived) == ({"counts", "other"}, {"counts"})


def test_uses_follows_classes_and_their_methods() -> None:
    def agent() -> None:
        Helper().method()

    assert used(agent) == ({"counts", "other"}, {"other"})
    assert used(Helper().method) == ({"counts"}, set())


def test_a_method_named_as_a_table_is_no_use_of_it() -> None:
    def agent() -> Any:
        return "abc".count("a")

    assert used(agent) == (set(), set())


def test_defaults_are_uses() -> None:
    def agent(first: Any = COUNTS, *, second: Any = OTHER) -> None:
        first["x"] = second["x"]

    assert used(agent) == ({"counts", "other"}, {"counts"})


def test_an_alias_in_the_function_is_a_use_and_its_writes_are_seen() -> None:
    def agent() -> None:
        table = COUNTS
        table["x"] += 1

    assert used(agent) == ({"counts"}, {"counts"})


@pytest.mark.parametrize(
    "write",
    [
        lambda: COUNTS.update(a=1),
        lambda: COUNTS.setdefault("a", 1),
        lambda: COUNTS.clear(),
        lambda: COUNTS.popitem(),
        lambda: COUNTS.__setitem__("a", 1),
    ],
)
def test_writing_methods_are_writes(write: Any) -> None:
    assert used(write) == ({"counts"}, {"counts"})


def in_place() -> None:
    global COUNTS
    COUNTS |= {"a": 1}


def test_the_update_operator_is_a_write() -> None:
    assert used(in_place) == ({"counts"}, {"counts"})


def test_a_closure_variable_that_is_not_set_yet_is_skipped() -> None:
    def agent() -> None:
        later["x"] = 1

    assert used(agent) == (set(), set())
    later = COUNTS
    assert used(agent) == ({"counts"}, {"counts"})


def test_a_function_without_source_still_shows_its_tables() -> None:
    space: dict[str, Any] = {"__name__": PACKAGE, "COUNTS": COUNTS}
    exec("def agent():\n COUNTS['x'] = 1\n", space)  # noqa: S102

    assert used(space["agent"]) == ({"counts"}, set())
