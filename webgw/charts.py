"""Numbers as people read them, and as small pictures. No I/O."""

from collections.abc import Sequence

SPARK_WIDTH = 120
SPARK_HEIGHT = 28

# A value a second: the newest at the right edge, the oldest shown two minutes before it.
SPARK_VALUES = 121

# Between groups of digits: narrow, and no place to break a line.
_GAP = "\u202f"


def count(number: float) -> str:
    """A whole number with its thousands set apart.

    >>> count(1234567).replace("\u202f", " ")
    '1 234 567'
    """
    return f"{round(number):,}".replace(",", _GAP)


def rate(number: float) -> str:
    """Events a second: a decimal where it tells something.

    >>> rate(0.26), rate(12.34), rate(0)
    ('0.3', '12', '0')
    """
    return f"{number:.1f}" if 0 < number < 10 else count(number)


def short(number: float) -> str:
    """A number in at most five characters.

    >>> short(950), short(12_340), short(4_100_000)
    ('950', '12.3k', '4.1M')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            scaled = number / (1e3 if unit == "k" else size)
            return f"{scaled:.1f}{unit}" if scaled < 100 else f"{scaled:.0f}{unit}"
    return rate(number)


def size(size_bytes: float) -> str:
    """Bytes, in the unit that fits.

    >>> size(61 * 1024 * 1024).replace("\u00a0", " ")
    '61 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            break
        size_bytes /= 1024
    shown = f"{size_bytes:.1f}" if unit == "GiB" else f"{size_bytes:.0f}"
    return f"{shown}\u00a0{unit}"


def span(seconds: float) -> str:
    """A length of time, in its two largest units.

    >>> [span(seconds).replace("\u00a0", " ") for seconds in (0.4, 75, 11_520)]
    ['0 s', '1 min 15 s', '3 h 12 min']
    """
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}\u00a0s"
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60}\u00a0s"
    if whole < 86400:
        return f"{whole // 3600}\u00a0h {whole % 3600 // 60}\u00a0min"
    return f"{whole // 86400}\u00a0d {whole % 86400 // 3600}\u00a0h"


def ranges(numbers: Sequence[int]) -> str:
    """Partitions, runs of them joined.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0–2 5 7 8'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(
        f"{run[0]}–{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs
    )


def spark_line(values: Sequence[float]) -> str:
    """The `points` of a polyline through `values`, in a box of SPARK_WIDTH × SPARK_HEIGHT.

    The scale starts at zero, so that a steady number looks steady; what was not seen yet is
    left blank.

    >>> spark_line([5, 10])
    '119.0,14.0 120.0,1.5'
    """
    shown = values[-SPARK_VALUES:]
    top = max(*shown, 1e-9, 1e-9)
    step = SPARK_WIDTH / (SPARK_VALUES - 1)
    room = SPARK_HEIGHT - 3
    return " ".join(
        f"{SPARK_WIDTH - at * step:.1f},{SPARK_HEIGHT - 1.5 - room * max(0.0, value) / top:.1f}"
        for at, value in zip(range(len(shown) - 1, -1, -1), shown, strict=True)
    )


def spark_area(values: Sequence[float]) -> str:
    """The `points` of a polygon: the line of `values` and the ground under it."""
    line = spark_line(values)
    if not line:
        return ""
    first_x = line.partition(",")[0]
    return f"{first_x},{SPARK_HEIGHT} {line} {SPARK_WIDTH},{SPARK_HEIGHT}"


def spark_words(what: str, values: Sequence[float]) -> str:
    """The picture in words, for who cannot see it."""
    if not values:
        return f"{what}: nothing recorded yet"
    return (
        f"{what} over the last two minutes: lowest {short(min(values))}, "
        f"highest {short(max(values))}, now {short(values[-1])}"
    )
