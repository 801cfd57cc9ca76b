"""When a cron job is due, right at changes of daylight saving time and at jumps of the clock.

    Cron("30 9 * * mon-fri", tz="Europe/Berlin").next(now)

Five fields: minute, hour, day of month, month, day of week; a sixth, as in Faust, is seconds
and comes last. Also @yearly @annually @monthly @weekly @daily @midnight @hourly. Where both
day fields are given, either may match, as cron does it. Without a zone the times are UTC.

Jobs with a wildcard hour or minute follow elapsed time: every 15 minutes stays every 15
minutes. Jobs at a fixed time run once: in an hour that is skipped at the first instant after
it, in an hour that comes twice in its first pass only. No I/O but the zone's own data; `now`
is always an argument.
"""

import difflib
import re
import zoneinfo
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any

from crontab import CronTab

from streamd.errors import ConfigError

_ALIASES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_FIELDS = (
    ("minute", "0-59"),
    ("hour", "0-23"),
    ("day of month", "1-31, or L for the last"),
    ("month", "1-12 or jan-dec"),
    ("day of week", "0-7 or sun-sat"),
    ("second", "0-59"),
)
_DAY, _WEEKDAY, _SECOND = 2, 4, 5
# The package takes a range that ends with 0 for one that ends with 7, also in "0-0", and also
# in the day of month.
_SUNDAY_ALONE = re.compile(r"\b(0|sun)-(?:0|sun)\b(?:/\d+)?")
_UP_TO_ZERO = re.compile(r"\d-0+(?!\d)")
_SOME_TIME = datetime(2001, 1, 1, tzinfo=UTC)
_STEP = timedelta(days=7)


class Cron:
    """A cron text in a zone.

    Attributes:
        expr: The text as it was given.
        tz: The zone, as Python's own type.
    """

    def __init__(self, expr: str, tz: tzinfo | str | None = None) -> None:
        """Read the text.

        Args:
            expr: Five or six fields, or an alias.
            tz: A zone of zoneinfo, pytz or datetime, a zone's name, or None: UTC.

        Raises:
            ConfigError: The text or the zone cannot be read, or the time never comes.
        """
        self.expr = expr
        self.tz = zone_of(tz)
        fields = _split(expr)
        star_day, star_weekday = (fields[i][0] in "*?" for i in (_DAY, _WEEKDAY))
        if star_day or star_weekday:
            self._tabs = [_tab(expr, fields)]
        else:
            self._tabs = [
                _tab(expr, [*fields[:other], "*", *fields[other + 1 :]])
                for other in (_DAY, _WEEKDAY)
            ]
        self._fixed = not fields[0].startswith("*") and not fields[1].startswith("*")
        if self._next_wall(_SOME_TIME) is None:
            raise ConfigError(
                f"the cron text {expr!r} names a day that never comes",
                remedy="the fields are: minute hour day-of-month month day-of-week",
            )

    def __repr__(self) -> str:
        return f"Cron({self.expr!r}, tz={self.zone!r})"

    @property
    def zone(self) -> str:
        """The zone's name: "UTC", "Europe/Berlin", "UTC+02:00"."""
        return str(self.tz)

    def describe(self) -> str:
        """The text and its zone, for people."""
        return f"{self.expr} ({self.zone})"

    def next(self, after: datetime) -> datetime | None:
        """The first time later than `after`, in UTC; None beyond 2099.

        UTC since times of one zone are compared by their walls, which may come twice. For
        people: `.astimezone(cron.tz)`.

        Raises:
            ValueError: `after` has no zone.
        """
        if after.utcoffset() is None:
            raise ValueError(f"{after!r} has no zone: use datetime.now(timezone.utc)")
        after = after.astimezone(UTC)
        offset = self._offset(after)
        while True:
            wall = self._next_wall(after + offset)
            if wall is None:
                return None
            instant = wall - offset
            change = self._next_change(after, instant, offset)
            if change is None:
                if self._fixed and self._is_second_pass(wall, instant):
                    after = instant
                    continue
                return instant
            changed = self._offset(change)
            if self._fixed and wall < change + changed:
                return change
            # Search on by the new offset, from just before the change, which may be due itself.
            after, offset = change - timedelta(seconds=1), changed

    def missed(self, last: datetime, now: datetime) -> bool:
        """True if a time was due later than `last` and not later than `now`."""
        due = self.next(last)
        return due is not None and _seconds(due, now) <= 0

    # Wall clock times carry UTC as their zone: arithmetic on them knows no changes.

    def _next_wall(self, wall: datetime) -> datetime | None:
        found = [tab.next(wall, return_datetime=True) for tab in self._tabs]
        return min((time for time in found if time is not None), default=None)

    def _offset(self, instant: datetime) -> timedelta:
        offset = instant.astimezone(self.tz).utcoffset()
        assert offset is not None
        return offset

    def _is_second_pass(self, wall: datetime, instant: datetime) -> bool:
        return wall.replace(tzinfo=self.tz, fold=0).astimezone(UTC) != instant

    def _next_change(
        self, after: datetime, until: datetime, offset: timedelta
    ) -> datetime | None:
        """The first instant in (after, until] whose offset is not `offset`."""
        low = after
        while low < until:
            high = min(until, low + _STEP)
            if self._offset(high) == offset:
                low = high
                continue
            while high - low > timedelta(seconds=1):
                middle = (low + (high - low) / 2).replace(microsecond=0)
                if middle <= low:
                    break
                if self._offset(middle) == offset:
                    low = middle
                else:
                    high = middle
            return high
        return None


class CronClock:
    """Which slots of a job have been run, whatever the wall clock does.

    Ask `due_in`, sleep that long but at most some 30 s (the clock may be set meanwhile), and
    run the job when `take` says so. A clock set back runs no slot twice: nothing is due until
    it has caught up. A clock set forward, or a long sleep, runs one of the slots it missed.
    """

    def __init__(self, cron: Cron, now: datetime) -> None:
        self.cron = cron
        self.due = cron.next(now)  # the next slot; None: there is none any more

    def due_in(self, now: datetime) -> float:
        """Seconds until the next slot, 0 if it has come, infinity if there is none."""
        if self.due is None:
            return float("inf")
        return max(0.0, _seconds(self.due, now))

    def take(self, now: datetime) -> bool:
        """True, once, when a slot has come; the next one is then waited for."""
        if self.due is None or _seconds(self.due, now) > 0:
            return False
        # From the slot, not from now: a timer that is early would run it again.
        following = self.cron.next(self.due)
        if following is not None and _seconds(following, now) <= 0:
            following = self.cron.next(now)
        self.due = following
        return True


def zone_of(tz: Any) -> tzinfo:
    """The zone that was meant: see `Cron`.

    Raises:
        ConfigError: There is no such zone.
    """
    if tz is None:
        return UTC
    # A zone of pytz answers wrongly outside pytz's own functions: its name is what counts.
    name = tz if isinstance(tz, str) else getattr(tz, "zone", None)
    if isinstance(name, str):
        return _named_zone(name)
    if isinstance(tz, tzinfo):
        fixed = tz.utcoffset(None)
        return timezone(fixed) if fixed is not None and hasattr(tz, "zone") else tz
    raise ConfigError(
        f"{tz!r} is no time zone: a name or a zone of zoneinfo, pytz or datetime is expected",
        remedy='write tz="Europe/Berlin"',
    )


def _named_zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        known = zoneinfo.available_timezones()
        close = difflib.get_close_matches(name, known, n=3)
        if not known:
            remedy = "this machine has no zones: install the package tzdata"
        else:
            remedy = f"did you mean {' or '.join(close)}" if close else 'write "Europe/Berlin"'
        raise ConfigError(f"there is no time zone {name!r}", remedy=remedy) from error


def _seconds(due: datetime, now: datetime) -> float:
    return (due - now.astimezone(UTC)).total_seconds()


def _split(expr: str) -> list[str]:
    """The six fields of a text, seconds last.

    Raises:
        ConfigError: There are more or fewer, or the alias is unknown.
    """
    if not isinstance(expr, str):
        raise ConfigError(f"the cron text is {expr!r}: a str of five or six fields is expected")
    text = expr.strip().lower()
    if text.startswith("@") and text not in _ALIASES:
        raise ConfigError(
            f"the cron text {expr!r} is unknown: there are {', '.join(sorted(_ALIASES))}",
            remedy="for an interval use @app.timer(seconds)",
        )
    fields = _ALIASES.get(text, text).split()
    if len(fields) not in {5, 6}:
        raise ConfigError(
            f"the cron text {expr!r} has {len(fields)} fields: five are expected (minute hour"
            " day-of-month month day-of-week), or six with the seconds last",
        )
    fields[_WEEKDAY] = _SUNDAY_ALONE.sub(r"\1", fields[_WEEKDAY])
    return fields if len(fields) == 6 else [*fields, "0"]


def _tab(expr: str, fields: list[str]) -> CronTab:
    try:
        return _tab_of(fields)
    except ValueError:
        raise _wrong_field(expr, fields) from None


def _tab_of(fields: list[str]) -> CronTab:
    if _UP_TO_ZERO.search(fields[_DAY]):
        raise ValueError("there is no day 0")
    # The package takes seconds first and a year last.
    return CronTab(" ".join([fields[_SECOND], *fields[:_SECOND], "*"]))


def _wrong_field(expr: str, fields: list[str]) -> ConfigError:
    """Which field it is: the one that is refused among wildcards."""
    for index, (name, allowed) in enumerate(_FIELDS):
        alone = ["*"] * len(_FIELDS)
        alone[index] = fields[index]
        try:
            _tab_of(alone)
        except ValueError as error:
            reason = str(error).replace("isoweekday ", "")
            # What int() and unpacking say of "1/2/3" says nothing to people.
            detail = "" if "unpack" in reason or "literal" in reason else f": {reason}"
            return ConfigError(
                f"the cron text {expr!r} has {fields[index]!r} as its {name}{detail};"
                f" expected {allowed}, *, a-b, */n, or a list of these with commas"
            )
    return ConfigError(f"the cron text {expr!r} cannot be read")
