"""What the master tells: stacks, log lines, status, systemd, and why it does not start."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from supervisor_tree import Tree, allowed_s, eventually, many, tree_of

from streamd.link import connect
from streamd.wire import Command, Hello

STUCK = """
import asyncio, re
import streamd
app = streamd.App("proj")
other = app.topic("other", value_type=str)

def catastrophe():
    print("in it")
    re.match(r"(a+)+$", "a" * 60 + "b")

@app.agent(other)
async def fine(stream):
    async for event in stream:
        pass

@app.task
async def stick():
    await asyncio.sleep(0.5)
    catastrophe()
"""

CHATTY = """
import logging, os
import streamd
app = streamd.App("proj")
one = app.topic("one", value_type=str)
log = logging.getLogger("chatty")

def talk(name):
    for number in range(3000):
        print(name, number, "x" * 280, flush=True)
    log.warning("%s says\\nin two lines", name)
    log.debug("not this")
    os.write(1, b"\\x1b[2J\\xff bad bytes and no end")

@app.agent(one)
async def agent(stream):
    async for event in stream:
        talk("agent")

@app.task
async def task():
    await one.send(value="go")
    talk("task")
"""


def test_usr1_shows_every_process_also_the_one_that_is_stuck_in_c() -> None:
    with tree_of(STUCK) as house:
        house.run(option_web_enabled="true")
        eventually(lambda: "in it" in house.log)
        began = time.monotonic()

        house.signal(signal.SIGUSR1)

        heads = ("master", "zygote", "log", "web", "fine#0", "app#0")
        eventually(lambda: all(f"== {name} (pid" in house.log for name in heads))
        assert time.monotonic() - began < 2.0
        stuck = house.log.partition("== app#0 (pid")[2].partition("== ")[0]
        assert "in catastrophe" in stuck
        assert "its loop does not turn" in stuck
        fine = house.log.partition("== fine#0 (pid")[2].partition("== ")[0]
        assert "Task " in fine and "-- end of tasks --" in fine
        # Fixture data of the app must not be in a dump.
        assert "aaaaaaaa" not in house.log


def test_stacks_of_one_process_by_a_verb() -> None:
    with tree_of() as house:
        house.run()

        text = house.ask("stacks", names=["app#0"])

        assert text.startswith("== app#0 (pid")
        assert "== master" not in text


def test_log_lines_of_two_chatty_processes_are_whole() -> None:
    with tree_of(CHATTY) as house:
        house.run()
        eventually(lambda: house.log.count("says") >= 2, 20)
        house.signal(signal.SIGTERM)
        assert house.wait_exit() == 0

        lines = house.log.splitlines()
        for name, process in (("agent", "agent#0"), ("task", "app#0")):
            whole = re.compile(rf"\S{{10}} \S{{8}} INFO    {process}  {name} \d+ x{{280}}")
            numbers = [line.split()[5] for line in lines if whole.fullmatch(line)]
            assert numbers == [str(number) for number in range(3000)]
        assert "not this" not in house.log
        assert "\x1b" not in house.log
        assert house.log.count("bad bytes and no end") == 2


def test_the_last_lines_are_kept_and_followed() -> None:
    with tree_of(CHATTY) as house:
        house.run()
        eventually(lambda: house.log.count("says") >= 2, 20)

        lines = list(house.answers("logs", names=["agent"], lines=3, level="WARN"))

        assert [line["text"] for line in lines] == ["agent says\nin two lines"]
        assert lines[0]["process"] == "agent#0" and lines[0]["pid"] == house.pid("agent#0")


def test_a_follower_gets_lines_as_they_come() -> None:
    async def follow(house: Tree) -> dict[str, object]:
        link = await connect(house.folder.control_path, "master")
        stream = link.stream(Command("logs", {"follow": True, "lines": 0, "names": ["master"]}))
        first = asyncio.ensure_future(anext(stream))
        # In turns: a line that repeats is only counted.
        for number in itertools.cycle((signal.SIGTTIN, signal.SIGTTOU)):
            if first.done():
                break
            house.signal(number)
            await asyncio.sleep(0.05)
        link.close()
        await link.closed.wait()
        return first.result().data  # type: ignore[attr-defined, no-any-return]

    with tree_of() as house:
        house.run()

        line = asyncio.run(follow(house))

        assert str(line["text"]) in (
            "TTIN: no group can have more processes",
            "TTOU: no group has more than one process",
        )


def test_the_status_says_all_that_the_seam_promises_in_time() -> None:
    with tree_of() as house:
        house.run(option_web_enabled="true")
        began = time.monotonic()

        status = house.ask("status")

        assert time.monotonic() - began < 0.25 * 3
        assert status["schema"] == "streamd.status/1"
        assert status["state"] == "running"
        assert status["sentence"] == "All 4 processes run; 0 events behind."
        assert {"name", "app", "pid", "guardian_pid", "mode", "since", "web", "broker"} < set(
            status
        )
        kinds = [row["kind"] for row in status["processes"]]
        assert kinds == ["guardian", "master", "zygote", "log", "agent", "web"]
        assert all(row["rss_bytes"] > 0 for row in status["processes"])
        assert status["broker"] == "embedded"
        assert json.dumps(status)


def test_silent_clients_and_wrong_frames_do_not_matter() -> None:
    with tree_of() as house, contextlib.ExitStack() as open_ones:
        house.run()
        for content in [b""] * 40 + [b"\xff\xff\xff\xff", b"\0\0\0\x04junk"]:
            client = socket.socket(socket.AF_UNIX)
            open_ones.enter_context(client)
            client.connect(str(house.folder.control_path))
            client.sendall(content)

        assert house.ask("status")["state"] == "running"
        assert house.folder.control_path.stat().st_mode & 0o777 == 0o600


def test_wrong_commands_are_refused_in_a_sentence() -> None:
    with tree_of() as house:
        house.run()

        wrong: list[tuple[str, dict[str, Any], str]] = [
            ("fly", {}, "no command 'fly'"),
            ("restart", {"names": ["nobody"]}, "there is no process 'nobody'"),
            ("stop", {"mode": "lukewarm"}, "stop is warm or cold"),
            ("scale", {"group": "app", "processes": 2}, "run in one process"),
            ("scale", {"group": "none", "processes": 2}, "there is no group 'none'"),
            ("scale", {"group": "app"}, "scale takes a group and a number or 'auto'"),
        ]
        for verb, args, text in wrong:
            with pytest.raises(Exception, match=re.escape(text)):
                house.ask(verb, **args)


def test_verbs_that_tell_about_the_app_and_the_tree() -> None:
    with tree_of() as house:
        house.run()

        assert msgspec.convert(house.ask("hello"), Hello).groups[-1].name == "app"
        assert {owner["process"] for owner in house.ask("owners")["owners"]} == {"app#0"}
        assert {row["process"] for row in house.ask("tree")} >= {"guardian", "master", "app#0"}
        assert any("started by start" in event["text"] for event in house.ask("events"))


def test_a_stop_by_the_verb_ends_the_connection_when_it_is_done() -> None:
    with tree_of() as house:
        house.run()

        with pytest.raises(Exception, match="closed the connection"):
            list(house.answers("stop", mode="warm", wait=True))

        assert house.wait_exit() == 0


def test_an_app_that_cannot_be_imported_is_an_error_that_shows_where() -> None:
    source = many(2) + "\ndef broken():\n    return 1 / 0\n\nbroken()\n"
    with tree_of(source) as house:
        began = time.monotonic()
        house.start()

        error = house.wait_ready()["error"]

        assert house.wait_exit() == 78
        assert "ZeroDivisionError" in error["message"]
        assert error["exit_code"] == 78
        assert "in broken" in "\n".join([*error["seen"], error["traceback"]])
        assert time.monotonic() - began < allowed_s(2.0)
        assert {told["process"] for told in house.told if "process" in told} == {"zygote"}


def test_a_data_directory_in_use_is_refused_with_the_cure() -> None:
    with tree_of() as one, tree_of() as other:
        one.run()

        other.start(option_datadir=str(one.place / "data"))
        error = other.wait_ready()["error"]

        assert other.wait_exit() == 75
        assert f"is in use by proj (pid {one.pid('master')})" in error["message"]
        assert any("streamd scale" in line for line in error["seen"])
        assert any("Kafka" in line or "kafka" in line for line in error["seen"])
        assert (one.place / "data").stat().st_mode & 0o777 == 0o700


def test_a_taken_port_is_refused_and_the_taker_named() -> None:
    with tree_of() as one, tree_of() as other:
        web = one.run(option_web_enabled="true").ask("status")["web"]

        other.start(
            {"STREAMD_RUNTIME_DIR": str(one.place / "run")},
            option_web_enabled="true",
            option_web_port=web.rpartition(":")[2],
        )
        error = other.wait_ready()["error"]

        assert other.wait_exit() == 75
        assert f"is taken by proj (pid {one.pid('master')})" in error["message"]
        assert "-p 0" in error["remedy"] and "--without-web" in error["remedy"]


def test_the_memory_broker_is_refused_where_processes_would_not_meet() -> None:
    with tree_of() as house:
        house.start(option_broker="memory://")

        error = house.wait_ready()["error"]

        assert house.wait_exit() == 78
        assert "it is for tests" in error["message"]


def test_history_survives_a_restart_and_its_loss_costs_nothing_else() -> None:
    with tree_of() as house:
        house.run()
        house.signal(signal.SIGTERM)
        house.wait_exit()

        house.run()
        again = [event["text"] for event in house.ask("events")]
        house.signal(signal.SIGTERM)
        house.wait_exit()
        (house.place / "data" / "registry.db").write_bytes(b"not a database" * 100)
        house.run()

        assert sum(text.startswith("started by start: pid ") for text in again) == 2
        assert "the registry" in house.log and "going on without" in house.log
        assert house.ask("status")["state"] == "running"


def test_a_daemon_without_a_log_file_writes_to_its_data_directory() -> None:
    with tree_of() as house:
        house.run(foreground=False, logfile=None)
        log = house.place / "data" / "streamd.log"
        eventually(lambda: "is ready after" in log.read_text())

        os.kill(house.pid("master"), signal.SIGKILL)

        assert house.wait_exit() == 70
        assert "its tree was ended too" in log.read_text()


def test_all_groups_are_in_one_process_with_worker() -> None:
    with tree_of(CHATTY) as house:
        house.run(mode="worker")

        rows = [
            row["name"] for row in house.ask("status")["processes"] if row["kind"] == "agent"
        ]

        assert rows == ["app#0"]


def test_a_process_has_no_descriptor_of_the_master() -> None:
    with tree_of() as house:
        house.run(option_web_enabled="true")
        folder = Path(f"/proc/{house.pid('app#0')}/fd")

        targets = [os.readlink(entry) for entry in folder.iterdir()]

        assert not [each for each in targets if each.endswith(("/data/lock", "registry.db"))]
        assert [each for each in targets if each.endswith("tree.lock")]


EAGER = """
import asyncio, json, os, urllib.request
import streamd
app = streamd.App("proj")
one = app.topic("one", value_type=str)

@app.agent(one)
async def agent(stream):
    async for event in stream:
        pass

@app.page("/hello/")
async def hello(self, request):
    return self.text("hello")

@app.task
async def ask_oneself():
    record = os.environ["STREAMD_RUNTIME_DIR"] + "/proj/instance.json"
    url = json.load(open(record))["web"] + "/hello/"
    def get():
        return urllib.request.urlopen(url, timeout=10).read().decode()
    print("answered", await asyncio.get_running_loop().run_in_executor(None, get))
"""


@pytest.mark.parametrize("mode", ["start", "worker"])
def test_a_task_starts_when_pages_are_served(mode: str) -> None:
    with tree_of(EAGER) as house:
        house.run(option_web_enabled="true", mode=mode)

        eventually(lambda: "answered hello" in house.log, 15)

        assert house.log.index("is ready after") < house.log.index("answered hello")
        assert house.process("app#0")["restarts"] == 0
        # One that is restarted does not wait for another start.
        os.kill(house.pid("app#0"), signal.SIGKILL)
        eventually(lambda: house.log.count("answered hello") == 2, 15)


def test_a_start_tells_where_the_log_is() -> None:
    with tree_of() as house:
        house.run()

        assert f"on the embedded log in {house.place / 'data'}" in house.log
        zygote = next(told for told in house.told if told.get("state") == "ready")
        assert zygote["detail"].endswith(f"embedded log in {house.place / 'data'}")


def test_a_log_process_that_is_killed_while_it_starts_does_not_end_the_start() -> None:
    with tree_of() as house:
        house.run(
            environment={"STREAMD_TEST": "1", "STREAMD_FAILPOINT": "commit.before-begin:1:kill"}
        )

        assert "was ended by SIGKILL from outside" in house.log
        assert house.told[-1]["ready"]
