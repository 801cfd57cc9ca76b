"""What flows where, laid out in columns: topics, agents, tables, pages. No I/O.

A node stands one column right of the last one that leads to it; within a column, nodes stand
where what leads to them stands, so that lines cross seldom.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from streamd.wire import RouteInfo

NODE_WIDTH = 176
NODE_HEIGHT = 46
COLUMN_STEP = NODE_WIDTH + 58
ROW_STEP = NODE_HEIGHT + 20
MARGIN = 10
LABEL_CHARS = 21


class Node(NamedTuple):
    """A box of the picture; `x` and `y` are its upper left corner."""

    key: str  # "agent:proj.count_words"
    kind: str  # "topic" | "agent" | "table" | "page"
    label: str
    title: str
    cell: str  # name of the cell that its second line shows, "" for `note`
    note: str
    x: float = 0
    y: float = 0

    @property
    def short_label(self) -> str:
        """The label, cut to what fits; its end tells more than its beginning."""
        if len(self.label) <= LABEL_CHARS:
            return self.label
        return "…" + self.label[-(LABEL_CHARS - 1) :]


class Picture(NamedTuple):
    """Nodes and the curves between them; `words` says the same as text."""

    nodes: list[Node]
    curves: list[str]
    width: float
    height: float
    words: str


def draw(snapshot: Mapping[str, Any], routes: Iterable[RouteInfo]) -> Picture:
    """The picture of an app."""
    nodes, edges = graph(snapshot, routes)
    return lay_out(nodes, edges)


def graph(
    snapshot: Mapping[str, Any], routes: Iterable[RouteInfo]
) -> tuple[list[Node], list[tuple[str, str]]]:
    """The nodes, not placed yet, and the edges between their keys."""
    nodes: dict[str, Node] = {}
    edges: list[tuple[str, str]] = []

    def topic(name: str) -> str:
        key = f"topic:{name}"
        nodes.setdefault(key, Node(key, "topic", name, f"topic {name}", "", "topic"))
        return key

    agents = snapshot.get("agents", ())
    for agent in agents:
        key = f"agent:{agent['name']}"
        title = f"agent {agent['name']}"
        nodes[key] = Node(key, "agent", agent["label"], title, f"a.{agent['name']}.flow", "")
        edges += [(topic(name), key) for name in agent.get("topics", ())]
        edges += [(key, topic(name)) for name in agent.get("sends", ())]
    for table in snapshot.get("tables", ()):
        key = f"table:{table['name']}"
        title = f"table {table['name']}"
        nodes[key] = Node(key, "table", table["name"], title, f"t.{table['name']}.held", "")
        writers = table.get("agents") or [
            agent["name"] for agent in agents if agent["group"] == table["group"]
        ]
        edges += [(f"agent:{name}", key) for name in writers]
    for route in routes:
        source = f"table:{route.table}"
        if source not in nodes:
            continue
        key = f"page:{route.path}"
        title = f"page {route.path}"
        nodes.setdefault(key, Node(key, "page", route.path, title, "", "page"))
        edges.append((source, key))
    known = [
        (tail, head) for tail, head in dict.fromkeys(edges) if {tail, head} <= nodes.keys()
    ]
    return list(nodes.values()), known


def lay_out(nodes: Sequence[Node], edges: Sequence[tuple[str, str]]) -> Picture:
    """Place each node and draw each edge."""
    column = _columns([node.key for node in nodes], edges)
    rows = _rows([node.key for node in nodes], edges, column)
    tallest = max((len(keys) for keys in rows), default=0)
    placed: dict[str, Node] = {}
    by_key = {node.key: node for node in nodes}
    for index, keys in enumerate(rows):
        top = MARGIN + (tallest - len(keys)) * ROW_STEP / 2
        for row, key in enumerate(keys):
            x, y = MARGIN + index * COLUMN_STEP, top + row * ROW_STEP
            placed[key] = by_key[key]._replace(x=x, y=y)
    width = 2 * MARGIN + max(0, len(rows) - 1) * COLUMN_STEP + (NODE_WIDTH if rows else 0)
    height = 2 * MARGIN + max(0, tallest - 1) * ROW_STEP + (NODE_HEIGHT if rows else 0)
    curves = [_curve(placed[tail], placed[head]) for tail, head in edges]
    words = "; ".join(f"{by_key[tail].title} → {by_key[head].title}" for tail, head in edges)
    return Picture(list(placed.values()), curves, width, height, words)


def _columns(keys: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The longest way to each node; an edge that closes a circle is not followed."""
    before: dict[str, list[str]] = {key: [] for key in keys}
    for tail, head in edges:
        before[head].append(tail)
    column: dict[str, int] = {}
    on_way: set[str] = set()

    def place(key: str) -> int:
        if key not in column:
            on_way.add(key)
            tails = [tail for tail in before[key] if tail not in on_way]
            column[key] = 1 + max((place(tail) for tail in tails), default=-1)
            on_way.discard(key)
        return column[key]

    for key in keys:
        place(key)
    return column


def _rows(
    keys: Sequence[str], edges: Sequence[tuple[str, str]], column: Mapping[str, int]
) -> list[list[str]]:
    rows: list[list[str]] = [[] for _ in range(max(column.values(), default=-1) + 1)]
    for key in keys:
        rows[column[key]].append(key)
    before: dict[str, list[str]] = {}
    for tail, head in edges:
        before.setdefault(head, []).append(tail)
    height: dict[str, float] = {}
    for row in rows:
        for at, key in enumerate(row):
            heights = [height[tail] for tail in before.get(key, ()) if tail in height]
            height[key] = sum(heights) / len(heights) if heights else float(at)
        row.sort(key=lambda key: height[key])
        for at, key in enumerate(row):
            # Relative to the middle: columns are centred.
            height[key] = at - (len(row) - 1) / 2
    return rows


def _curve(tail: Node, head: Node) -> str:
    x1, y1 = tail.x + NODE_WIDTH, tail.y + NODE_HEIGHT / 2
    x2, y2 = head.x, head.y + NODE_HEIGHT / 2
    if x2 > x1:
        bend = (x2 - x1) / 2
        return f"M{x1:g} {y1:g}C{x1 + bend:g} {y1:g} {x2 - bend:g} {y2:g} {x2 - 5:g} {y2:g}"
    # Back to the left, round below both.
    low = max(tail.y, head.y) + NODE_HEIGHT + 14
    return (
        f"M{x1:g} {y1:g}C{x1 + 40:g} {y1:g} {x1 + 40:g} {low:g} {(x1 + x2) / 2:g} {low:g}"
        f"S{x2 - 40:g} {y2:g} {x2 - 5:g} {y2:g}"
    )
