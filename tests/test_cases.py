"""The table of supervision cases in tests/README.md is whole, and names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
CASES = 86


def rows() -> dict[int, str]:
    """What shows each case, by its number."""
    text = (TESTS / "README.md").read_text()
    found = re.findall(r"^\| (\d+) [^|]*\| ([^|]*) \|$", text, re.MULTILINE)
    numbers = [int(number) for number, _ in found]
    assert len(numbers) == len(set(numbers)), "a case stands there twice"
    return {int(number): shown for number, shown in found}


def defined() -> set[str]:
    """The names of all tests."""
    return {
        name
        for path in TESTS.rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }


def test_every_case_is_shown_by_a_test_or_does_not_apply() -> None:
    assert sorted(rows()) == list(range(1, CASES + 1))
    assert not [
        number
        for number, shown in rows().items()
        if "test_" not in shown and not shown.startswith("does not apply: ")
    ]


def test_every_test_that_is_named_there_exists() -> None:
    named = {name for shown in rows().values() for name in re.findall(r"\btest_\w+", shown)}

    assert named - defined() == set()
