"""Packs, source positions and markers, for any outputs, cuts and replays."""

from collections import defaultdict
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.agentproc.broker import TP, Output, Segment
from streamd.agentproc.broker.pack import MAX_PACK_BYTES, MAX_PACK_EVENTS
from streamd.agentproc.kafka.markers import (
    NOBODY,
    Incarnation,
    Marker,
    decode_marker,
    encode_marker,
    newest,
    pack_highs,
    unpack_highs,
)
from streamd.agentproc.kafka.packs import (
    Columns,
    count_header,
    cut,
    index_of,
    no_events,
    offset_of,
    open_pack,
    packed_count,
    position_of,
    stamps_of,
)
from streamd.agentproc.kafka.sources import Gap, Highs, Run, Tracer, sift
from streamd.errors import BrokerError

TARGET = TP("words", 0)
SOURCE = TP("posts", 3)
AGENT = "proj.split"


def packs_of(output: Output, tracer: Tracer | None = None) -> list[Columns]:
    packs = list(cut(output, tracer or Tracer()))
    opened = [open_pack(data, TARGET, n) for n, (_, data) in enumerate(packs)]
    assert [count for count, _ in packs] == [len(columns.values) for columns in opened]
    return opened


def events_of(columns: Columns) -> list[int | None]:
    """The source position of each record of a pack, None where it has none."""
    found: list[int | None] = []
    for run in columns.runs or []:
        if not run.agent:
            found += [None] * run.count
        elif not run.ordinals:
            found += [run.first] * run.count
        else:
            ordinals = memoryview(run.ordinals).cast("I")
            found += [run.first + ordinal for ordinal in ordinals]
    return found


def output_for(positions: Iterable[int], size_bytes: int = 1) -> Output:
    """Records sent for the events at `positions`; each value tells its place among them."""
    each = list(positions)
    values: list[bytes | None] = [b"%d" % n + b"x" * size_bytes for n in range(len(each))]
    return Output(
        TARGET, [None] * len(each), values, [1.0] * len(each),
        sources=[Segment(len(each), AGENT, SOURCE, each)],
    )  # fmt: skip


fan_outs = st.lists(st.integers(0, 5), min_size=1, max_size=60).filter(any)
sizes = st.sampled_from([1, 1, 1, 200, MAX_PACK_BYTES // 3, MAX_PACK_BYTES + 1])


@st.composite
def outputs(draw: st.DrawFn) -> Output:
    """An output as an engine may make it: some segments of events, some of nothing."""
    output = Output(TARGET, [], [], [], sources=[])
    assert output.sources is not None
    position = draw(st.integers(0, 1 << 40))
    for _ in range(draw(st.integers(1, 4))):
        fans = draw(fan_outs)
        positions = [position + at for at, fan in enumerate(fans) for _ in range(fan)]
        position += len(fans)
        known = draw(st.booleans())
        output.sources.append(
            Segment(len(positions), AGENT, SOURCE, positions)
            if known
            else Segment(len(positions))
        )
        size = draw(sizes) if len(positions) < 20 else 1
        output.keys += [draw(st.sampled_from([None, b"", b"k"])) for _ in positions]
        output.values += [b"v" * size for _ in positions]
        output.timestamps += [draw(st.sampled_from([1.0, 2.5])) for _ in positions]
    if draw(st.booleans()):
        output.headers = [draw(st.sampled_from([[], [("h", b"1")]])) for _ in output.keys]
    return output


@given(outputs())
@settings(max_examples=150, deadline=None)
def test_packs_hold_every_record_in_order_and_never_split_an_event(output: Output) -> None:
    opened = packs_of(output)

    keys = [key for columns in opened for key in columns.keys or []]
    headers = [
        header
        for columns in opened
        for header in columns.headers or [[] for _ in columns.values]
    ]
    assert keys == output.keys
    assert [v for columns in opened for v in columns.values] == output.values
    assert [t for columns in opened for t in stamps_of(columns)] == output.timestamps
    assert [[tuple(h) for h in each] for each in headers] == (
        output.headers or [[] for _ in keys]
    )
    wanted: list[int | None] = []
    for segment in output.sources or []:
        wanted += segment.positions or [None] * segment.count
    assert [e for columns in opened for e in events_of(columns)] == wanted
    for before, after in zip(opened, opened[1:], strict=False):
        last, first = events_of(before)[-1], events_of(after)[0]
        assert last != first or last is None or after.runs[0].part > before.runs[-1].part  # type: ignore[index]


def test_an_event_that_sends_more_than_a_pack_holds_is_cut_the_same_way_each_time() -> None:
    many = [7] * (2 * MAX_PACK_EVENTS + 3)

    alone = packs_of(output_for(many))
    beside = packs_of(output_for([5, 6, *many, 8]))

    assert [columns.runs[0].part for columns in alone] == [0, 1, 2]  # type: ignore[index]
    assert [len(c.values) for c in alone] == [MAX_PACK_EVENTS, MAX_PACK_EVENTS, 3]
    parts = [(r.part, r.count) for c in beside for r in c.runs or [] if r.first == r.last == 7]
    assert parts == [(0, MAX_PACK_EVENTS), (1, MAX_PACK_EVENTS), (2, 3)]


def test_large_records_are_packs_of_their_own() -> None:
    opened = packs_of(output_for([1, 2, 2, 3], MAX_PACK_BYTES))

    assert [events_of(columns) for columns in opened] == [[1], [2], [2], [3]]
    assert [columns.runs[0].part for columns in opened] == [0, 0, 1, 0]  # type: ignore[index]


def test_an_empty_pack_holds_nothing() -> None:
    columns = open_pack(no_events(), TARGET, 9)

    assert (columns.keys, columns.values, stamps_of(columns)) == ([], [], [])


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"[]", b"\x91\x90", b"\x94\x91\xc0\x90\x00\xc0"]
)
def test_what_is_no_pack_is_refused_with_its_place(data: bytes) -> None:
    with pytest.raises(BrokerError, match=r"words\[0\]@9"):
        open_pack(data, TARGET, 9)


def test_positions_and_the_header_tell_record_index_and_count() -> None:
    position = position_of(1 << 50, 999)

    assert (offset_of(position), index_of(position)) == (1 << 50, 999)
    assert position_of(5, MAX_PACK_EVENTS - 1) < position_of(6)
    assert packed_count([("a", b"1"), *count_header(17)]) == 17
    assert packed_count([("streamd-pack", b"soon")]) == packed_count(None) == 0


# Replays.


@given(
    fans=st.lists(st.integers(0, 4), min_size=1, max_size=50),
    tries=st.lists(
        st.tuples(st.integers(0, 50), st.integers(1, 50), st.integers(1, 9)),
        min_size=1, max_size=8,
    ),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_of_any_replays_each_record_is_taken_once_in_order(
    fans: list[int], tries: list[tuple[int, int, int]]
) -> None:
    """Senders begin at or below what the ones before have sent, and end wherever they die."""
    highs: Highs = {}
    gaps: list[Gap] = []
    got: list[tuple[int, int]] = []
    sent_up_to = 0
    for begin, length, chunk in [*tries, (0, len(fans), 7)]:
        tracer = Tracer()
        begin = min(begin, sent_up_to, len(fans))
        end = min(len(fans), begin + length)
        for low in range(begin, end, chunk):
            high = min(end, low + chunk)
            records = [(e, n) for e in range(low, high) for n in range(fans[e])]
            if records:
                output = output_for([event for event, _ in records])
                at = 0
                for columns in packs_of(output, tracer):
                    for start, stop in sift(highs, columns.runs or [], gaps):
                        got += records[at + start : at + stop]
                    at += len(columns.values)
        sent_up_to = max(sent_up_to, end)

    assert gaps == []
    assert got == [(event, n) for event, fan in enumerate(fans) for n in range(fan)]


@given(lost=st.integers(1, 4), chunk=st.integers(1, 3), events=st.integers(6, 20))
def test_records_behind_lost_ones_are_refused_until_their_sender_comes_again(
    lost: int, chunk: int, events: int
) -> None:
    highs: Highs = {}
    gaps: list[Gap] = []
    got: list[bytes | None] = []

    def send(tracer: Tracer, lossy: bool) -> None:
        for number, low in enumerate(range(0, events, chunk)):
            output = output_for(range(low, min(events, low + chunk)))
            for columns in packs_of(output, tracer):
                if not (lossy and number == lost):
                    for start, end in sift(highs, columns.runs or [], gaps):
                        got.extend(columns.values[start:end])

    send(Tracer(), lossy=True)
    refused = len(gaps)
    taken = len(got)
    send(Tracer(), lossy=False)

    later = len(range(0, events, chunk)) - lost - 1
    assert refused == max(0, later)
    assert taken == min(events, lost * chunk)
    assert len(got) == events


def test_a_reset_or_a_topic_made_anew_sends_no_replays() -> None:
    highs: Highs = {}
    tracer = Tracer()
    tracer.topics = {SOURCE: "one"}
    first = tracer.run(TARGET, AGENT, SOURCE, [1, 2, 3])
    tracer.resets = {SOURCE.partition: 1}
    reset = tracer.run(TARGET, AGENT, SOURCE, [1, 2, 3])
    tracer.topics = {SOURCE: "two"}
    anew = tracer.run(TARGET, AGENT, SOURCE, [1, 2, 3])

    taken = [sift(highs, [run], []) for run in (first, first, reset, anew)]

    assert taken == [[(0, 3)], [], [(0, 3)], [(0, 3)]]


def test_what_was_sent_for_no_event_is_never_dropped() -> None:
    highs: Highs = {}
    runs = [Run(2), Run(1, AGENT, "g", "posts", 0, 5, 5), Run(1)]

    assert [sift(highs, runs, []) for _ in range(2)] == [[(0, 4)], [(0, 2), (3, 4)]]


def test_who_gets_a_partition_back_leaves_no_gap_by_what_another_sent_meanwhile() -> None:
    highs: Highs = {}
    gaps: list[Gap] = []
    mine, other = Tracer(), Tracer()

    for tracer, positions in ((mine, [1, 2]), (other, [2, 3, 4])):
        sift(highs, [tracer.run(TARGET, AGENT, SOURCE, positions)], gaps)
    mine.forget([SOURCE.partition])
    kept = sift(highs, [mine.run(TARGET, AGENT, SOURCE, [5])], gaps)

    assert (kept, gaps) == ([(0, 1)], [])


# Markers.

incarnations = st.builds(Incarnation, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))


@given(incarnations, st.integers(0, 2**32 - 1))
def test_a_marker_survives_its_bytes_and_a_later_version_may_add_to_it(
    incarnation: Incarnation, number: int
) -> None:
    highs: Highs = {(AGENT, "g/0", "posts", 3): (position_of(9, 4), 2)}
    marker = Marker(
        incarnation, number, {"c": 5}, {AGENT: {"posts": 1 << 60}}, {"w": pack_highs(highs)}, 1
    )

    decoded = decode_marker(encode_marker(marker))

    assert decoded == marker
    assert unpack_highs(decoded.highs["w"]) == highs
    assert incarnation.stamp(number)[:8] == Incarnation(*incarnation).stamp(0)[:8]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), max_size=30))
def test_the_last_marker_of_the_highest_incarnation_counts_whatever_comes_late(
    history: list[tuple[int, int]],
) -> None:
    markers = [
        Marker(Incarnation(epoch, luck), number, {}, {}, {})
        for number, (epoch, luck) in enumerate(history)
    ]

    best = newest(markers)

    if not history:
        assert best.incarnation == NOBODY
        return
    last = defaultdict(int, {pair: n for n, pair in enumerate(history)})
    assert (best.incarnation, best.number) == (max(history), last[max(history)])


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 9)), max_size=12))
def test_compaction_changes_nothing_of_what_counts(
    owners: list[tuple[int, bool, int]],
) -> None:
    """Some claims miss the last checkpoint of who was before, and are made again."""
    owner = Marker(Incarnation(1, 0), 0, {}, {}, {})
    log = [owner]

    def claim(over_number: int, luck: int) -> Marker:
        epoch = max(marker.incarnation for marker in log).epoch + 1
        incarnation = Incarnation(epoch, luck)
        log.append(
            Marker(incarnation, 0, {}, {}, {}, over=owner.incarnation, over_number=over_number)
        )
        return log[-1]

    for checkpoints, misses, luck in owners:
        for _ in range(checkpoints):
            owner = msgspec.structs.replace(owner, number=owner.number + 1)
            log.append(owner)
        if misses and owner.number:
            claim(owner.number - 1, luck)
            assert newest(log) == owner
        owner = claim(owner.number, luck)

    last = {marker.incarnation: n for n, marker in enumerate(log)}
    compacted = [log[n] for n in sorted(last.values())]
    assert newest(log) == newest(compacted) == owner
