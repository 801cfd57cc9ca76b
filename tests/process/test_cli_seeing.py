"""`ps`, `top`, `events`, `history` and `stacks` as an operator uses them."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cli_place import Place, eventually, place

APP = """
import asyncio, time
import streamd
app = streamd.App("proj", hang_limit="1s", web_enabled=False)
words = app.topic("words", key_type=str, value_type=str, partitions=4)
counts = app.Table("counts", default=int, partitions=4)

@app.agent(words, processes=2)
async def count_words(stream):
    async for word in stream:
        if word == "slow":
            await asyncio.sleep(3600)
        if word == "block":
            time.sleep(3600)
        counts[word] += 1
"""


@pytest.fixture
def here() -> Iterator[Place]:
    with place(APP) as found:
        started = found.run("start -A proj --datadir data --grace 1s")
        assert started.returncode == 0, started.stderr
        yield found


def rows(here: Place, verb: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in here.run(f"{verb} --json").stdout.splitlines()]


def pid_of(here: Place, process: str) -> int:
    (document,) = rows(here, "ps")
    found: list[int] = [
        row["pid"] for row in document["processes"] if row["name"] == process and row["pid"]
    ]
    return found[0] if found else 0


def test_a_restart_is_told_with_its_reason_also_when_nothing_runs_any_more(here: Place) -> None:
    before = pid_of(here, "count_words#0")
    following = here.spawn("events -f --kind restart")
    try:
        os.kill(before, signal.SIGKILL)
        eventually(lambda: "runs again after" in here.run("events").stdout)
        assert following.stdout is not None
        line = following.stdout.readline()
    finally:
        following.send_signal(signal.SIGINT)
        following.communicate(timeout=10)

    told = f"count_words#0 (pid {before}) was ended by SIGKILL from outside; restarted at once"
    assert f"restart  {told}" in line
    (event,) = rows(here, "events count_words --kind restart")
    assert event["process"] == "count_words#0" and event["text"].startswith(told)
    assert rows(here, "events --kind start")[0]["text"].startswith("started by start: pid ")
    assert "was ended by SIGKILL from outside" in here.run("ps").stdout

    assert here.run("stop").returncode == 0

    stopped = here.run("events")
    assert stopped.returncode == 3 and "Try: streamd history" in stopped.stderr
    shown = here.run("history")
    assert shown.returncode == 0
    assert re.search(r"^count_words#0 .* 1  .* exited with 0$", shown.stdout, re.MULTILINE)
    assert re.search(r"^zygote +\d{4}-", shown.stdout, re.MULTILINE)
    assert told in shown.stdout and "stopping: what runs is finished first" in shown.stdout
    document = json.loads(here.run("history count_words --json").stdout)
    assert {row["name"] for row in document["processes"]} == {"count_words#0", "count_words#1"}
    assert here.run("history -D data --name other -n 1").stdout.count("ended with 0") == 1
    nowhere = here.run("history -D nowhere")
    assert nowhere.returncode == 1 and "there is no history at" in nowhere.stderr


def test_history_tells_who_runs_and_who_was_killed_with_the_master(here: Place) -> None:
    def ends() -> dict[str, str]:
        document = json.loads(here.run("history --json").stdout)
        return {row["name"]: row["how"] for row in document["processes"]}

    eventually(lambda: set(ends().values()) == {"runs"})  # written a moment after the start

    listed = here.run("kill --tree --dry-run").stdout
    assert {line.split()[1] for line in listed.splitlines()[1:-1]} == {
        "guardian", "master", "zygote", "log", "count_words#0", "count_words#1", "app#0"
    }  # fmt: skip
    assert here.run("kill --tree").returncode == 0

    assert set(ends().values()) == {"was killed with its master"}


def test_a_hang_and_a_restart_by_hand_are_events(here: Place) -> None:
    here.run(["send", "words", "--key", "k", "block"])

    eventually(lambda: rows(here, "events --kind hang"), 15)
    (hang, *_) = rows(here, "events --kind hang")
    assert "in count_words (" in hang["text"] and "proj.py:14" in hang["text"]
    assert here.run("restart app").returncode == 0
    (asked,) = rows(here, "events app --kind restart")
    assert asked["text"].endswith("is restarted: it was asked for")


def test_top_is_one_picture_where_nobody_watches(here: Place) -> None:
    lines = here.run("top").stdout.splitlines()

    assert lines[0].startswith("proj  running")
    assert "\x1b" not in "".join(lines)
    assert any(re.match(r"count_words +2 +0 +0 +0$", line) for line in lines)
    document = json.loads(here.run("top --json -s memory").stdout)
    private = [row["private_bytes"] for row in document["processes"]]
    assert private == sorted(private, reverse=True)
    assert document["schema"] == "streamd.top/1"


DIES = """
import streamd
app = streamd.App("proj", web_enabled=False)

@app.task
async def dies():
    raise SystemExit("no licence")
"""


def test_what_was_given_up_is_told_with_the_reason_and_its_last_words() -> None:
    with place(DIES) as here:
        here.run("start -A proj --datadir data")
        eventually(lambda: "FATAL" in here.run("status").stdout, 30)

        shown = here.run("status")

        assert shown.returncode == 1
        first, _, *more = shown.stdout.splitlines()
        assert first.startswith("proj  degraded")
        assert re.match(r"app#0: FATAL, 5 crashes in \d+ s without progress: exited w", more[0])
        assert more[1:] == [
            "    no licence",
            "    task dies ended its process with exit code 1",
            "Try: streamd restart app#0",
        ]
        assert re.search(r"app#0 +- +fatal +in \d m \d+ s ", here.run("ps").stdout)


class Terminal:
    """`streamd` in a terminal of its own."""

    def __init__(self, here: Place, line: str) -> None:
        self.ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (12, 60))
        self.theirs = theirs
        self.before = termios.tcgetattr(theirs)
        self.seen = ""
        self.process = subprocess.Popen(
            here.command(line),
            cwd=here.folder,
            env={**here.environment, "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )

    def sees(self, text: str, within_s: float = 15.0) -> bool:
        deadline = time.monotonic() + within_s
        while text not in self.seen and time.monotonic() < deadline:
            if select.select([self.ours], [], [], 0.1)[0]:
                self.seen += os.read(self.ours, 65536).decode(errors="replace")
        return text in self.seen

    def types(self, keys: str) -> None:
        self.seen = ""
        os.write(self.ours, keys.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal(here: Place) -> Iterator[Terminal]:
    shown = Terminal(here, "top -i 0.2s")
    with contextlib.closing(shown):
        yield shown


def test_top_draws_over_itself_sorts_by_keys_and_gives_the_terminal_back(
    terminal: Terminal,
) -> None:
    assert terminal.sees("\x1b[?1049h") and terminal.sees("by cpu · q quit")
    assert terminal.sees("lines more")  # it has twelve lines

    terminal.types("m")
    assert terminal.sees("by memory · q quit")
    picture = terminal.seen.split("\x1b[?2026h\x1b[H")[-1].split("\x1b[J")[0]
    assert "\x1b[2J" not in terminal.seen  # it would flicker
    shown = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in picture.split("\r\n")]
    assert len(shown) <= 12 and all(len(line) <= 60 for line in shown)

    terminal.types("q")
    assert terminal.process.wait(10) == 0
    assert terminal.sees("\x1b[?1049l")
    assert termios.tcgetattr(terminal.theirs) == terminal.before


def test_top_says_so_when_the_instance_ends(here: Place, terminal: Terminal) -> None:
    assert terminal.sees("by cpu · q quit")

    assert here.run("stop").returncode == 0

    assert terminal.process.wait(15) == 3
    assert terminal.sees("\x1b[?1049l") and terminal.sees("proj does not run")
    assert termios.tcgetattr(terminal.theirs) == terminal.before
