"""What the page is made of: numbers, pictures, rows, metrics; and who may name the port."""

import doctest
import importlib
from typing import Any

import pytest

from streamd.webgw import charts, metrics
from streamd.webgw.options import WebOptions, may_be_called
from streamd.webgw.overview import Overview, Trend, view_of
from streamd.webgw.topology import NODE_HEIGHT, NODE_WIDTH, Node, draw, lay_out
from streamd.wire import RouteInfo

NOW = 1_700_000_000.0


def snapshot(**more: Any) -> dict[str, Any]:
    process = {"name": "count#0", "kind": "agent", "group": "count", "pid": 7,
               "since": NOW - 75, "state": "RUNNING", "restarts": 2,
               "partitions": [0, 1, 2, 5]}  # fmt: skip
    return {
        "state": "running", "sentence": "All is well.", "since": NOW - 60, "rate": 12.5,
        "behind": 1200, "errors": 1, "dead_letters": 0,
        "processes": [process, {"name": "master", "kind": "master", "state": "RUNNING"}],
        "agents": [{"name": "p.count", "label": "count", "group": "count", "topics": ["in"],
                    "rate": 12.5, "behind": 1200, "events": 10}],
        "tables": [{"name": "counts", "group": "count", "keys": 3, "partitions": 8}],
        "history": [{"t": NOW - 1, "rate": 10, "behind": 3},
                    {"t": NOW, "rate": 5, "behind": 0}],
        "events_log": [{"t": NOW, "level": "INFO", "text": "count#0 is RUNNING"}],
        "problems": [],
    } | more  # fmt: skip


def view(**more: Any) -> Overview:
    return view_of(snapshot(**more), Trend(), [], NOW)


@pytest.mark.parametrize("name", ["charts", "options", "routes"])
def test_the_examples_of_docstrings_hold(name: str) -> None:
    module = importlib.import_module(f"streamd.webgw.{name}")

    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0


def test_the_newest_value_stands_at_the_right_edge_and_the_highest_at_the_top() -> None:
    line = charts.spark_line([0, 10, 5])

    assert line.split()[-1].startswith("120.0,")
    heights = [float(point.partition(",")[2]) for point in line.split()]
    assert heights[1] == min(heights) and heights[0] == max(heights)
    assert charts.spark_area([0, 10]).startswith("119.0,28 ")


def test_two_minutes_are_shown_however_many_values_there_are() -> None:
    points = charts.spark_line([1.0] * 500).split()

    assert points[0].startswith("0.0,") and points[-1].startswith("120.0,")


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0], [-1.0, 3.0]])
def test_a_picture_stays_in_its_box(values: list[float]) -> None:
    for point in charts.spark_line(values).split():
        x, _, y = point.partition(",")
        assert 0 <= float(x) <= charts.SPARK_WIDTH and 0 <= float(y) <= charts.SPARK_HEIGHT


def test_numbers_change_cells_but_not_the_shape_of_the_page() -> None:
    before, after = view(), view(rate=99.0, behind=0)

    assert before.shape == after.shape
    assert after.cells["rate"] == "99" and after.cells["behind"] == "0"


@pytest.mark.parametrize(
    "change",
    [
        {"processes": []},
        {"problems": [{"process": "count#0", "text": "restarts"}]},
        {"events_log": []},
        {"tables": []},
    ],
    ids=lambda change: next(iter(change)),
)
def test_rows_that_come_or_go_change_the_shape(change: dict[str, Any]) -> None:
    assert view(**change).shape != view().shape


def test_processes_stand_below_their_master() -> None:
    rows = view().processes

    assert [row.name for row in rows] == ["master", "count#0"]
    assert rows[1].branch == "└"


def test_a_process_that_waits_says_when_it_is_tried_again() -> None:
    waiting = {"name": "count#0", "kind": "agent", "state": "BACKOFF", "retry_in_s": 4.2}
    cells = view(processes=[waiting]).cells

    assert cells["p.count#0.state@class"] == "state backoff"
    assert cells["p.count#0.up"].replace("\u00a0", " ") == "again in 4 s"
    assert cells["p.count#0.pid"] == "–"


def test_a_snapshot_that_says_next_to_nothing_is_shown() -> None:
    shown = view_of({"state": "starting"}, Trend(), [], NOW)

    assert shown.processes == [] and shown.cells["rate"] == "0"


def test_a_trend_shows_what_each_second_added() -> None:
    trend = Trend()
    for errors in (1, 1, 4, 0):
        trend.add({"errors": errors})

    assert trend.steps("errors") == [0, 3, 0]


def test_a_topology_leads_from_left_to_right() -> None:
    page = RouteInfo(1, "/count/{word}/", ["GET"], "", "count", "counts", "word", None, "")
    picture = draw(snapshot(), [page])

    columns = {node.key: node.x for node in picture.nodes}
    assert (
        columns["topic:in"]
        < columns["agent:p.count"]
        < columns["table:counts"]
        < columns["page:/count/{word}/"]
    )
    assert len(picture.curves) == 3
    assert "topic in → agent p.count" in picture.words


def test_no_two_boxes_of_a_topology_overlap_and_all_are_inside() -> None:
    nodes = [Node(f"n{at}", "agent", f"n{at}", "", "", "") for at in range(12)]
    edges = [(f"n{at // 3}", f"n{at}") for at in range(1, 12)]

    picture = lay_out(nodes, edges)

    corners = [(node.x, node.y) for node in picture.nodes]
    for at, (x, y) in enumerate(corners):
        assert 0 <= x <= picture.width - NODE_WIDTH and 0 <= y <= picture.height - NODE_HEIGHT
        for other_x, other_y in corners[at + 1 :]:
            assert abs(x - other_x) >= NODE_WIDTH or abs(y - other_y) >= NODE_HEIGHT


def test_a_circle_of_agents_is_drawn() -> None:
    nodes = [Node(key, "agent", key, "", "", "") for key in "abc"]

    picture = lay_out(nodes, [("a", "b"), ("b", "c"), ("c", "a"), ("a", "a")])

    assert len(picture.curves) == 4


def test_nothing_is_drawn_of_nothing() -> None:
    assert draw({}, []).nodes == []


def test_names_in_metrics_are_escaped() -> None:
    odd = snapshot(name='a"b\\c\nd')

    text = metrics.render(odd, 2).decode()

    assert 'name="a\\"b\\\\c\\nd"' in text
    assert "streamd_behind_events 1200\n" in text
    assert 'streamd_process_restarts_total{process="count#0",group="count"} 2\n' in text
    assert "streamd_open_pages 2\n" in text


def test_lag_on_kafka_is_told_by_partition() -> None:
    row = {"group": "count", "agent": "p.count", "topic": "in", "partition": 3,
           "position": None, "end": 7, "behind": 7}  # fmt: skip

    text = metrics.render(snapshot(lag=[row]), 0).decode()

    labels = 'group="count",agent="p.count",topic="in",partition="3"'
    assert f"streamd_lag_records{{{labels}}} 7\n" in text


def test_each_metric_is_described_once_and_before_its_samples() -> None:
    seen: list[str] = []
    for line in metrics.render(snapshot(), 0).decode().splitlines():
        name = line.split()[2] if line.startswith("#") else line.partition("{")[0].split()[0]
        if line.startswith("# HELP"):
            assert name not in seen
            seen.append(name)
        assert name == seen[-1]


@pytest.mark.parametrize(
    ("host", "settings", "allowed"),
    [
        ("localhost", {}, True),
        ("LOCALHOST:80", {}, True),
        ("127.0.0.1:6066", {}, True),
        ("127.8.9.1", {}, True),
        ("[::1]:6066", {}, True),
        ("", {}, False),
        ("evil.example", {}, False),
        ("localhost.evil.example", {}, False),
        ("127.0.0.1.evil.example", {}, False),
        ("10.0.0.7", {}, False),
        ("10.0.0.7", {"web_bind": "0.0.0.0"}, True),
        ("[2001:db8::1]:6066", {"web_bind": "::"}, True),
        ("evil.example", {"web_bind": "0.0.0.0"}, False),
        ("Counts.example:443", {"web_hosts": ["counts.example"]}, True),
        ("any.example", {"web_hosts": ["*"]}, True),
        ("counts.example", {"web_bind": "counts.example"}, True),
    ],
)
def test_who_may_name_the_port(host: str, settings: dict[str, Any], allowed: bool) -> None:
    assert may_be_called(host, WebOptions.of(settings)) is allowed


def test_settings_that_are_not_given_have_their_defaults() -> None:
    options = WebOptions.of({"web_token": None, "web_max_body": 5, "other": 1})

    assert options == WebOptions(max_body_bytes=5)
    assert not options.exposed


def test_a_body_is_never_larger_than_a_frame_takes() -> None:
    assert WebOptions.of({"web_max_body": 2**40}).max_body_bytes < 16 * 2**20
