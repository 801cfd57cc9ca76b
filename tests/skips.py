"""Fails where a test was skipped for a reason that tests/README.md does not list."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def listed() -> set[str]:
    """The reasons in the list of capabilities."""
    text = (Path(__file__).parent / "README.md").read_text()
    return set(re.findall(r"^- `([^`]+)`", text, re.MULTILINE))


def main(report: str) -> int:
    """0 where every skip is listed, 1 with the others on stderr."""
    allowed, unlisted = listed(), []
    for case in ElementTree.parse(report).iter("testcase"):
        for skipped in case.iter("skipped"):
            if skipped.get("message") not in allowed:
                unlisted.append(f"{case.get('name')}: {skipped.get('message')}")
    for line in unlisted:
        sys.stderr.write(f"skipped for a reason that is not listed: {line}\n")
    return 1 if unlisted else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
