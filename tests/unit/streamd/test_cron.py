import itertools
import zoneinfo
from datetime import UTC, datetime, timedelta, timezone, tzinfo

import pytest
import pytz
from cronsim import CronSim
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.cron import Cron, CronClock, zone_of
from streamd.errors import ConfigError

NEW_YORK = zoneinfo.ZoneInfo("America/New_York")
# Their clocks go forward at whole hours, not at midnight: elsewhere cronsim gives times that
# there are not, or leaves some out.
ZONES = ["UTC", "America/New_York", "Europe/Berlin", "Europe/London", "Asia/Kolkata"]
ODD_ZONES = [
    "America/Santiago",
    "Pacific/Chatham",
    "Atlantic/Azores",
    "Africa/Cairo",
    "Australia/Lord_Howe",
]


def times(expr: str, tz: tzinfo | str | None, start: datetime, count: int) -> list[str]:
    """The next times as wall clock and offset."""
    cron = Cron(expr, tz)
    found = []
    for _ in range(count):
        due = cron.next(start)
        assert due is not None
        found.append(due.astimezone(cron.tz).strftime("%d %H:%M:%S %z"))
        start = due
    return found


# Against cronsim


def numbers(low: int, high: int) -> st.SearchStrategy[str]:
    number = st.integers(low, high)
    span = st.tuples(number, number).map(lambda pair: f"{min(pair)}-{max(pair)}")
    some = st.lists(number, min_size=1, max_size=3, unique=True).map(
        lambda parts: ",".join(map(str, sorted(parts)))
    )
    return st.one_of(st.just("*"), number.map(str), span, some)


MINUTE = st.one_of(numbers(0, 59), st.sampled_from(["*/5", "*/15", "*/20", "10-50/20"]))
HOUR = st.one_of(numbers(0, 23), st.sampled_from(["*/2", "*/6", "1-3"]))
TEXTS = st.tuples(
    MINUTE, HOUR, numbers(1, 28), st.one_of(st.just("*"), numbers(1, 12)), numbers(0, 6)
).map(" ".join)
# Half of the starts are close to a change of some zone.
STARTS = st.one_of(
    st.datetimes(datetime(2024, 1, 1), datetime(2027, 1, 1)),
    st.tuples(
        st.sampled_from(
            [
                datetime(2026, 3, 8, 6),
                datetime(2026, 11, 1, 5),
                datetime(2026, 3, 29, 0),
                datetime(2026, 10, 25, 0),
                datetime(2026, 4, 4, 13),
                datetime(2026, 9, 26, 13),
                datetime(2026, 4, 5, 3),
                datetime(2026, 9, 6, 4),
            ]
        ),
        st.integers(-4 * 3600, 2 * 3600),
    ).map(lambda pair: pair[0] + timedelta(seconds=pair[1])),
).map(lambda time: time.replace(microsecond=0, tzinfo=UTC))


def comes_once(time: datetime) -> bool:
    return time.replace(fold=0).utcoffset() == time.replace(fold=1).utcoffset()


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, zone=st.sampled_from(ZONES), start=STARTS)
def test_the_next_times_are_cronsims(text: str, zone: str, start: datetime) -> None:
    local = start.astimezone(zoneinfo.ZoneInfo(zone))
    if not comes_once(local):  # there cronsim answers with times before the start
        local += timedelta(hours=3)
    cron = Cron(text, zone)

    found = []
    due: datetime | None = local
    for _ in range(4):
        assert due is not None
        due = cron.next(due)
        found.append(due)

    assert found == [due.astimezone(UTC) for due in itertools.islice(CronSim(text, local), 4)]


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, zone=st.sampled_from([*ZONES, *ODD_ZONES]), start=STARTS)
def test_the_next_time_is_always_later_and_the_first(
    text: str, zone: str, start: datetime
) -> None:
    cron = Cron(text, zone)

    due = cron.next(start)

    assert due is not None and due > start and due.tzinfo is UTC
    assert cron.next(due - timedelta(microseconds=1)) == due
    between = start + (due - start) / 2
    assert cron.next(between) == due


# By hand, at the changes


def test_a_fixed_time_in_the_skipped_hour_runs_at_its_end() -> None:
    start = datetime(2026, 3, 8, 0, tzinfo=NEW_YORK)

    assert times("30 2 * * *", NEW_YORK, start, 2) == ["08 03:00:00 -0400", "09 02:30:00 -0400"]


def test_several_fixed_times_in_the_skipped_hour_run_once() -> None:
    start = datetime(2026, 3, 8, 0, tzinfo=NEW_YORK)

    assert times("15,30,45 2 * * *", NEW_YORK, start, 2) == [
        "08 03:00:00 -0400",
        "09 02:15:00 -0400",
    ]


def test_a_fixed_time_in_the_repeated_hour_runs_in_its_first_pass_only() -> None:
    start = datetime(2026, 11, 1, 0, tzinfo=NEW_YORK)

    assert times("30 1 * * *", NEW_YORK, start, 2) == ["01 01:30:00 -0400", "02 01:30:00 -0500"]


def test_a_fixed_time_asked_for_in_the_second_pass_is_tomorrow() -> None:
    start = datetime(2026, 11, 1, 1, 10, fold=1, tzinfo=NEW_YORK)

    assert times("30 1 * * *", NEW_YORK, start, 1) == ["02 01:30:00 -0500"]


def test_every_quarter_of_an_hour_stays_so_over_both_changes() -> None:
    for start in (datetime(2026, 11, 1, 4, tzinfo=UTC), datetime(2026, 3, 8, 5, tzinfo=UTC)):
        cron = Cron("*/15 * * * *", NEW_YORK)
        due = start
        for number in range(1, 20):
            following = cron.next(due)
            assert following == start + timedelta(minutes=15) * number
            due = following


def test_half_an_hours_change_is_followed() -> None:
    start = datetime(2026, 4, 5, 0, tzinfo=zoneinfo.ZoneInfo("Australia/Lord_Howe"))

    assert times("30 * * * *", "Australia/Lord_Howe", start, 4) == [
        "05 00:30:00 +1100",
        "05 01:30:00 +1100",
        "05 01:30:00 +1030",
        "05 02:30:00 +1030",
    ]


def test_a_gap_that_is_not_a_whole_hour_of_the_clock_leaves_no_time_out() -> None:
    start = datetime(2024, 9, 29, 1, tzinfo=zoneinfo.ZoneInfo("Pacific/Chatham"))

    assert times("44 */2 * * 0", "Pacific/Chatham", start, 3) == [
        "29 02:44:00 +1245",
        "29 04:44:00 +1345",
        "29 06:44:00 +1345",
    ]


def test_a_midnight_that_is_skipped_is_no_time() -> None:
    start = datetime(2026, 9, 5, 23, tzinfo=zoneinfo.ZoneInfo("America/Santiago"))

    assert times("*/30 0-1 * 9 0", "America/Santiago", start, 3) == [
        "06 01:00:00 -0300",
        "06 01:30:00 -0300",
        "13 00:00:00 -0300",
    ]


# Texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("@hourly", ["01 01:00:00 +0000", "01 02:00:00 +0000"]),
        ("@daily", ["02 00:00:00 +0000", "03 00:00:00 +0000"]),
        ("@midnight", ["02 00:00:00 +0000", "03 00:00:00 +0000"]),
        ("@weekly", ["04 00:00:00 +0000", "11 00:00:00 +0000"]),
        ("@monthly", ["01 00:00:00 +0000", "01 00:00:00 +0000"]),
        ("@yearly", ["01 00:00:00 +0000", "01 00:00:00 +0000"]),
        ("* * * * * */20", ["01 00:00:20 +0000", "01 00:00:40 +0000"]),
        ("5 0 * * * 7", ["01 00:05:07 +0000", "02 00:05:07 +0000"]),
        ("0 0 13 * 5", ["02 00:00:00 +0000", "09 00:00:00 +0000"]),
        ("0 0 L * *", ["31 00:00:00 +0000", "28 00:00:00 +0000"]),
        ("0 0 * * 7", ["04 00:00:00 +0000", "11 00:00:00 +0000"]),
        ("0 0 * jan sat-sun", ["03 00:00:00 +0000", "04 00:00:00 +0000"]),
        ("0 0 * * 0-0", ["04 00:00:00 +0000", "11 00:00:00 +0000"]),
        ("0 0 * * sun-sun/2", ["04 00:00:00 +0000", "11 00:00:00 +0000"]),
        ("0 0 1,3 1 MON", ["03 00:00:00 +0000", "05 00:00:00 +0000"]),
    ],
)
def test_a_text_means_these_times(text: str, expected: list[str]) -> None:
    assert times(text, None, datetime(2026, 1, 1, tzinfo=UTC), 2) == expected


def test_a_leap_day_waits_for_its_year() -> None:
    due = Cron("0 0 29 2 *").next(datetime(2025, 1, 1, tzinfo=UTC))

    assert due == datetime(2028, 2, 29, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("* * * *", "has 4 fields: five are expected"),
        ("* * * * * * *", "has 7 fields"),
        ("", "has 0 fields"),
        ("60 * * * *", r"has '60' as its minute: .*; expected 0-59"),
        ("* 24 * * *", r"has '24' as its hour: .*; expected 0-23"),
        ("* * 0 * *", r"has '0' as its day of month"),
        ("* * * foo *", r"has 'foo' as its month: .*; expected 1-12 or jan-dec"),
        ("* * * * fri-mon", r"has 'fri-mon' as its day of week"),
        ("* * 1-0 * *", r"has '1-0' as its day of month: there is no day 0"),
        ("* * 13 * 8", r"has '8' as its day of week"),
        ("* * * * * 60", r"has '60' as its second"),
        ("1/2/3 * * * *", r"has '1/2/3' as its minute; expected"),
        ("*/0 * * * *", r"as its minute"),
        ("@reboot", r"'@reboot' is unknown: there are @annually"),
        ("0 0 31 2 *", "names a day that never comes"),
        (None, "None: a str of five or six fields"),
    ],
)
def test_a_wrong_text_is_refused_with_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Cron(text)


def test_a_time_without_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="has no zone"):
        Cron("@daily").next(datetime(2026, 1, 1))


@settings(deadline=None)
@given(st.text("0123456789*/,-LlWw#? @abcjnr", max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        Cron(text).next(datetime(2026, 1, 1, tzinfo=UTC))
    except ConfigError as error:
        assert repr(text) in str(error)


# Zones


@pytest.mark.parametrize(
    "zone",
    ["Europe/Berlin", zoneinfo.ZoneInfo("Europe/Berlin"), pytz.timezone("Europe/Berlin")],
    ids=["name", "zoneinfo", "pytz"],
)
def test_a_zone_may_be_given_in_three_ways(zone: tzinfo | str) -> None:
    cron = Cron("0 6 * * *", zone)

    assert cron.next(datetime(2026, 7, 1, tzinfo=UTC)) == datetime(2026, 7, 1, 4, tzinfo=UTC)
    assert cron.describe() == "0 6 * * * (Europe/Berlin)"


@pytest.mark.parametrize(
    ("zone", "name"),
    [
        (None, "UTC"),
        (UTC, "UTC"),
        ("UTC", "UTC"),
        (pytz.utc, "UTC"),
        (timezone(timedelta(hours=2)), "UTC+02:00"),
        (pytz.FixedOffset(90), "UTC+01:30"),
    ],
    ids=str,
)
def test_a_fixed_zone_is_named(zone: tzinfo | str | None, name: str) -> None:
    assert Cron("@daily", zone).zone == name


def test_an_unknown_zone_is_refused_with_one_that_is_like_it() -> None:
    with pytest.raises(ConfigError, match="no time zone 'Europe/Berln'") as caught:
        Cron("@daily", "Europe/Berln")

    assert "Europe/Berlin" in (caught.value.remedy or "")


@pytest.mark.parametrize("zone", ["", "../etc/passwd", "Europe"])
def test_what_names_no_zone_is_refused(zone: str) -> None:
    with pytest.raises(ConfigError, match="no time zone"):
        zone_of(zone)


# The wall clock


NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def minutes(count: float) -> timedelta:
    return timedelta(minutes=count)


def test_a_slot_is_taken_once() -> None:
    clock = CronClock(Cron("*/5 * * * *"), NOON)

    assert clock.due_in(NOON) == 300.0
    assert not clock.take(NOON + minutes(4.999))
    assert clock.take(NOON + minutes(5))
    assert not clock.take(NOON + minutes(5))
    assert clock.due_in(NOON + minutes(6)) == 240.0


def test_a_timer_that_is_early_runs_its_slot_once() -> None:
    clock = CronClock(Cron("*/5 * * * *"), NOON)
    early = NOON + minutes(5) - timedelta(microseconds=1)

    assert [
        clock.take(early),
        clock.take(NOON + minutes(5)),
        clock.take(NOON + minutes(5)),
    ] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("back", [1, 5, 60, 60 * 24])
def test_a_clock_set_back_runs_no_slot_twice(back: int) -> None:
    clock = CronClock(Cron("*/5 * * * *"), NOON)
    assert clock.take(NOON + minutes(5))

    taken = [
        minute for minute in range(-back, 12) if clock.take(NOON + minutes(5) + minutes(minute))
    ]

    assert taken == [5, 10]


def test_a_clock_set_forward_runs_one_of_the_slots_it_missed() -> None:
    clock = CronClock(Cron("*/5 * * * *"), NOON)
    late = NOON + minutes(182)

    assert [clock.take(late), clock.take(late), clock.due_in(late)] == [True, False, 180.0]


@settings(max_examples=100, deadline=None)
@given(
    jumps=st.lists(st.integers(-7200, 7200), max_size=30),
    zone=st.sampled_from(ZONES),
    text=st.sampled_from(["*/5 * * * *", "30 1 * * *", "0 * * * *", "* * * * * */20"]),
    start=STARTS,
)
def test_no_jumps_of_the_clock_run_a_slot_twice_or_before_its_time(
    jumps: list[int], zone: str, text: str, start: datetime
) -> None:
    clock = CronClock(Cron(text, zone), start)
    now = start
    slots = []

    for jump in jumps:
        now += timedelta(seconds=jump)
        slot = clock.due
        assert slot is not None
        if clock.take(now):
            assert slot <= now
            assert clock.due is not None and clock.due > now
            slots.append(slot)
        else:
            assert clock.due_in(now) > 0

    assert slots == sorted(set(slots))


def test_missed_tells_whether_a_time_lay_between() -> None:
    cron = Cron("0 * * * *")

    assert cron.missed(NOON, NOON + minutes(60))
    assert not cron.missed(NOON, NOON + minutes(59))
    assert not cron.missed(NOON, NOON - minutes(200))


def test_a_job_without_times_left_is_never_due() -> None:
    clock = CronClock(Cron("@yearly"), datetime(2099, 6, 1, tzinfo=UTC))

    assert clock.due_in(datetime(2100, 1, 2, tzinfo=UTC)) == float("inf")
    assert not clock.take(datetime(2100, 1, 2, tzinfo=UTC))
