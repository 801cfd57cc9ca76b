"""The command line against a real instance: start, look, send, stop, kill."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from cli_place import Place, eventually, place

from streamd.instance import identify

PROJ = '''
import asyncio
import streamd
from streamd.cli import argument, option

app = streamd.App("proj")
words = app.topic("words", key_type=str, value_type=str, partitions=2)
counts = app.Table("counts", default=int, key_type=str, partitions=2, help="how often")


@app.agent(words)
async def count_words(stream):
    """Count words."""
    async for word in stream:
        counts[word] += 1


@app.agent(value_type=int)
async def double(stream):
    async for number in stream:
        yield number * 2


@app.crontab("30 2 * * *", timezone="America/New_York")
async def report():
    print("report")


@app.command(option("--times", type=int, default=2, help="How often."), argument("word"))
async def produce(self, times, word):
    """Send a word."""
    for _ in range(times):
        await words.send(key=word, value=word)
    self.say(f"sent {word}")
    return 7


@app.command(daemon=True)
async def watch(self):
    """Watch until a signal comes."""
    await words.send(key="seen", value="seen")
    self.say("watching")


@app.command()
async def divide(self):
    return 1 / 0


if __name__ == "__main__":
    app.main()
'''


@pytest.fixture
def here() -> Iterator[Place]:
    with place(PROJ) as found:
        yield found


@pytest.fixture(scope="module")
def running() -> Iterator[Place]:
    """An instance that runs, which the tests that use it leave as it is."""
    with place(PROJ) as found:
        started = found.run("start -A proj -p 0 --datadir data")
        assert started.returncode == 0, started.stderr
        yield found


# Start and stop.


def test_start_tells_of_each_process_and_stop_leaves_nothing(here: Place) -> None:
    started = here.run("start -A proj -p 0")

    assert started.returncode == 0, started.stderr
    for process in ("zygote", "log", "count_words#0", "double#0", "app#0", "web"):
        assert f"\n  {process:<18}ready" in started.stdout
    last = started.stdout.splitlines()[-1]
    assert last.startswith("Running. Stats: http://127.0.0.1:")
    assert last.endswith("Stop: streamd stop   Logs: streamd logs -f")

    again = here.run("start -A proj -p 0")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("Already running for ")
    assert again.stdout.endswith("Nothing done.\n")

    worker = here.run("worker -A proj")
    assert worker.returncode == 75
    assert "Error: proj runs already (pid" in worker.stderr
    assert "streamd scale" in worker.stderr
    assert "--datadir and --web-port" in worker.stderr
    assert "kafka://" in worker.stderr

    reset = here.run("reset -A proj --yes")
    assert reset.returncode == 75
    assert "reset needs it stopped" in reset.stderr

    stopped = here.run("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.startswith("Stopped proj in ")
    assert here.is_free("proj")
    assert here.run("status").returncode == 3


def test_start_and_stop_in_json_print_one_document_each(here: Place) -> None:
    for line, schema, there in (
        ("start -A proj -p 0 --json", "streamd.start/1", {"ready": True}),
        ("start -A proj -p 0 --json", "streamd.start/1", {"ready": True, "already": True}),
        ("kill -s USR2 --json", "streamd.kill/1", {"signal": "SIGUSR2"}),
        ("stop --json", "streamd.stop/1", {"state": "stopped"}),
        ("stop --json", "streamd.stop/1", {"state": "stopped"}),
    ):
        done = here.run(line)

        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["schema"] == schema
        assert there.items() <= document.items()


def test_an_uninstalled_clone_runs_by_python_m(here: Place) -> None:
    clone = here.environment.pop("PYTHONPATH")
    source = here.folder / "proj.py"

    def run(line: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            here.command(line),
            cwd=clone,
            env=here.environment,
            capture_output=True,
            text=True,
            timeout=30,
        )

    started = run(f"start -A {source} -W {here.folder} -p 0")

    assert started.returncode == 0, started.stderr
    assert run("stop").returncode == 0
    here.environment["PYTHONPATH"] = clone


def test_another_app_of_the_same_name_is_refused(here: Place) -> None:
    (here.folder / "other.py").write_text(PROJ)
    assert here.run("start -A proj -p 0").returncode == 0

    refused = here.run("start -A other --name proj")

    assert refused.returncode == 75
    assert "it runs proj" in refused.stderr


def test_the_guides_line_starts_a_worker_that_ctrl_c_stops(here: Place) -> None:
    worker = here.spawn("--datadir=w1 -A proj worker -l info --web-port=0")
    try:
        eventually(here.runs)
        shown = here.run("--json status")
        assert json.loads(shown.stdout)["mode"] == "worker"
        worker.send_signal(signal.SIGINT)
        output, _ = worker.communicate(timeout=15)
    finally:
        worker.kill()
        worker.wait()

    assert worker.returncode == 0
    assert output.startswith("streamd 0.")
    assert "is ready after" in output
    assert (here.folder / "w1").is_dir()
    assert here.is_free("proj")


@pytest.mark.parametrize("holds_lock", ["True", "False"])
@pytest.mark.parametrize("ended_by", ["start", "kill"])
def test_what_a_dead_tree_left_is_ended(here: Place, holds_lock: str, ended_by: str) -> None:
    leaving = f"""
import pathlib, subprocess

@app.task
async def leave():
    left = subprocess.Popen(
        ["sleep", "1000"], start_new_session=True, close_fds=not {holds_lock}
    )
    pathlib.Path("left").write_text(str(left.pid))
"""
    (here.folder / "leaving.py").write_text(
        PROJ.replace("if __name__", leaving + "\nif __name__")
    )
    assert here.run("start -A leaving -p 0").returncode == 0
    eventually(lambda: (here.folder / "left").exists() and (here.folder / "left").read_text())
    left = identify(int((here.folder / "left").read_text()))
    record = here.folder_of("leaving").read_record()
    assert record is not None
    # Stopped first, or the guardian would end the rest before it is killed itself.
    for number in (signal.SIGSTOP, signal.SIGKILL):
        os.kill(record.guardian.pid, number)
        os.kill(record.master.pid, number)
    eventually(lambda: not record.master.is_alive() and not record.guardian.is_alive())
    assert left.is_alive()

    if ended_by == "start":
        started = here.run("start -A leaving -p 0")
        assert started.returncode == 0, started.stderr
        assert "leaving had died and left " in started.stderr
    else:
        listed = here.run("kill --tree --dry-run -A leaving")
        assert f"  {left.pid} sleep" in listed.stdout
        killed = here.run("kill --tree")
        assert killed.returncode == 0, killed.stderr
        assert "none left" in killed.stdout
        assert here.run("kill --tree").stderr == "Nothing runs. Nothing done.\n"
    assert not left.is_alive()


def test_an_app_that_cannot_be_imported_is_told_by_start(here: Place) -> None:
    (here.folder / "broken.py").write_text("import streamd\n\nraise KeyError('colour')\n")

    for line in ("start -A broken", "start -A broken --foreground", "worker -A broken"):
        failed = here.run(line)
        assert failed.returncode == 78
        assert "Error: cannot import app 'broken': KeyError: 'colour'" in failed.stderr
        assert 'broken.py", line 3' in failed.stderr
        assert "streamd/finder.py" not in failed.stderr
        assert failed.stderr.count("Traceback") == 1
    assert here.is_free("broken")


def test_a_wrong_setting_is_told_by_start(here: Place) -> None:
    failed = here.run("start -A proj --web-bind 127.0.0.1 --grace soon")

    assert failed.returncode == 78
    assert "grace is 'soon' (option --grace)" in failed.stderr


def test_a_taken_port_is_told_by_start(running: Place) -> None:
    web = running.run("web").stdout.strip()

    with place(PROJ) as other:
        failed = other.run(f"start -A proj -p {web.rpartition(':')[2]}")

    assert failed.returncode == 75
    assert failed.stderr.startswith("Error: ")
    assert web.rpartition(":")[2] in failed.stderr


def test_ctrl_c_while_start_waits_stops_the_waiting_only(here: Place) -> None:
    (here.folder / "slow.py").write_text(
        "import time\ntime.sleep(2)\n" + PROJ.replace('"proj"', '"slow"')
    )
    starting = here.spawn("start -A slow -p 0")
    eventually(lambda: here.folder_of("slow").control_path.exists())

    starting.send_signal(signal.SIGINT)
    output, _ = starting.communicate(timeout=10)

    assert starting.returncode == 130
    assert "Waiting stopped; slow (pid " in output
    eventually(here.runs)


def test_start_that_takes_too_long_exits_124_and_goes_on(here: Place) -> None:
    (here.folder / "slow.py").write_text(
        "import time\ntime.sleep(1.5)\n" + PROJ.replace('"proj"', '"slow"')
    )

    late = here.run("start -A slow -p 0 -t 300ms")

    assert late.returncode == 124
    assert "is not ready after 0.3 s; it goes on starting" in late.stderr
    eventually(here.runs)


def test_start_stays_in_the_foreground_under_systemd(here: Place) -> None:
    here.environment["NOTIFY_SOCKET"] = str(here.runtime / "nobody")
    unit = here.spawn("start -A proj -p 0")
    try:
        eventually(lambda: here.folder_of("proj").read_record() is not None)
        record = here.folder_of("proj").read_record()
        assert record is not None
        assert record.guardian.pid == unit.pid
        assert record.mode == "start"
    finally:
        unit.terminate()
        unit.communicate(timeout=15)
    assert unit.returncode == 0


# Kill.


def test_kill_ends_everything_and_lists_it_before(here: Place) -> None:
    assert here.run("start -A proj -p 0").returncode == 0
    record = here.folder_of("proj").read_record()
    assert record is not None

    dry = here.run("kill --tree --dry-run")
    assert dry.stdout.startswith("would kill, of proj:\n")
    assert f"  {record.master.pid} " in dry.stdout
    assert record.master.is_alive()

    killed = here.run("kill --tree")
    assert killed.returncode == 0
    assert killed.stdout.startswith("killed ")
    assert killed.stdout.endswith("none left.\n")
    assert here.is_free("proj")


def test_kill_without_tree_lets_the_guardian_end_it(here: Place) -> None:
    assert here.run("start -A proj -p 0").returncode == 0

    killed = here.run("kill")

    assert killed.returncode == 0
    assert killed.stdout.endswith("none left.\n")
    assert here.is_free("proj")


def test_kill_of_all_asks_and_is_refused_without_a_terminal(here: Place) -> None:
    assert here.run("start -A proj -p 0").returncode == 0

    refused = here.run("kill --all")

    assert refused.returncode == 2
    assert "Try: add --yes" in refused.stderr
    assert not here.is_free("proj")


def test_a_signal_of_ones_choice_goes_to_the_master(here: Place) -> None:
    assert here.run("start -A proj -p 0").returncode == 0

    sent = here.run("kill -s TERM")

    assert sent.stdout.startswith("sent SIGTERM to the master (pid ")
    eventually(lambda: here.is_free("proj"))


# Look.


def test_status_is_two_lines(running: Place) -> None:
    shown = running.run("status")

    assert shown.returncode == 0
    first, second = shown.stdout.splitlines()
    assert first.startswith("proj  running  ")
    assert "http://127.0.0.1:" in first
    assert "7 of 7 processes running · " in second
    assert " behind · 0 errors" in second


def test_json_is_one_document_with_a_schema(running: Place) -> None:
    for line, schema in (
        ("status", "streamd.status/1"),
        ("ps", "streamd.ps/1"),
        ("web", "streamd.web/1"),
        ("agents", "streamd.agents/1"),
        ("topics", "streamd.topics/1"),
        ("tables", "streamd.tables/1"),
        ("cron", "streamd.cron/1"),
        ("config", "streamd.config/1"),
        ("check", "streamd.check/1"),
        ("kill --dry-run", "streamd.kill/1"),
        ("table counts", "streamd.table/1"),
    ):
        shown = running.run(f"--json -A proj {line}")
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout)["schema"] == schema


def test_ps_shows_every_process_in_columns(running: Place) -> None:
    lines = running.run("ps").stdout.splitlines()

    assert lines[0].split() == [
        "process", "pid", "state", "up", "cpu%", "private", "rss", "restarts", "partitions",
        "last", "end",
    ]  # fmt: skip
    assert lines[1].startswith("guardian ")
    assert lines[2].startswith("└ master ")
    assert lines[-1].startswith("  └ web ")
    (row,) = [line for line in lines if "  ├ count_words#0 " in line]
    assert "running" in row
    assert row.endswith("0  0 1         -")


def test_logs_are_filtered(running: Place) -> None:
    lines = running.run("logs -n 100").stdout.splitlines()
    assert any("proj is ready after" in line for line in lines)

    assert len(running.run("logs -n 2").stdout.splitlines()) == 2
    found = running.run("logs --grep is.ready.after").stdout.splitlines()
    assert len(found) == 1
    assert running.run("logs --level error").stdout == ""
    assert all(" master " in line for line in running.run("logs -p master").stdout.splitlines())
    assert running.run("logs --since 2001-01-01 --json -n 1").stdout.startswith('{"t": ')


def test_logs_of_nobody_are_refused(running: Place) -> None:
    nobody = running.run("logs nobody")

    assert (nobody.returncode, nobody.stdout) == (2, "")
    assert "there is no process 'nobody'\n  there is " in nobody.stderr


def test_status_tells_what_a_start_waits_for_and_exits_1(here: Place) -> None:
    (here.folder / "slow.py").write_text("import time\ntime.sleep(3)\n" + PROJ)
    assert here.run("start -A slow -p 0 --no-wait").returncode == 0
    eventually(lambda: here.folder_of("slow").control_path.exists())

    shown = here.run("status")

    assert shown.returncode == 1, shown.stderr
    assert shown.stdout.startswith("slow  starting  ")
    assert "Starting; waiting for zygote." in shown.stdout
    eventually(here.runs)
    assert here.run("status").returncode == 0


def test_logs_f_goes_on_as_lines_come(running: Place) -> None:
    following = running.spawn("logs -f -n 0")
    try:
        record = running.folder_of("proj").read_record()
        assert record is not None
        deadline = time.monotonic() + 10
        line = ""
        # Until it follows, what is logged is not seen: asked for again.
        while "log file was opened anew" not in line and "last line repeated" not in line:
            assert time.monotonic() < deadline
            os.kill(record.master.pid, signal.SIGUSR2)
            assert following.stdout is not None
            os.set_blocking(following.stdout.fileno(), False)
            line = following.stdout.readline()
            time.sleep(0.05)
    finally:
        following.send_signal(signal.SIGINT)
        following.communicate(timeout=10)
    assert following.returncode == 130


def test_events_and_stacks_and_web_are_told(running: Place) -> None:
    assert "started by start" in running.run("events").stdout
    stacks = running.run("stacks count_words").stdout
    assert "count_words#0" in stacks
    assert "File " in stacks
    assert running.run("web").stdout.startswith("http://127.0.0.1:")


def test_the_app_is_described_by_the_instance(running: Place) -> None:
    assert "proj.count_words  count_words" in running.run("agents").stdout
    assert running.run("agents double").stdout.count("\n") == 2
    assert "no agent is named 'nope'" in running.run("agents nope").stderr
    assert "how often" in running.run("tables").stdout
    assert "in " in running.run("cron --next 2").stdout
    port = running.run("config datadir").stdout.splitlines()[-1].split()
    assert port[0] == "datadir"
    assert port[-2:] == ["option", "--datadir"]


def test_names_are_completed_from_the_instance(running: Place) -> None:
    running.environment["_STREAMD_COMPLETE"] = "bash_complete"
    running.environment.update(COMP_WORDS="streamd restart cou", COMP_CWORD="2")
    try:
        completed = running.run("")
    finally:
        for name in ("_STREAMD_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
            del running.environment[name]

    assert "count_words#0" in completed.stdout


# Send and read.


def test_what_is_sent_is_counted_and_can_be_read(running: Place) -> None:
    sent = running.run("send words rose -k rose -r 3")
    assert sent.returncode == 0, sent.stderr
    assert len(sent.stdout.splitlines()) == 3
    assert all("@" in line for line in sent.stdout.splitlines())

    eventually(lambda: running.run("table counts rose").stdout == "3\n")
    assert running.run("table counts --prefix ro").stdout.split() == [
        "key", "value", '"rose"', "3",
    ]  # fmt: skip
    missing = running.run("table counts lily")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "counts has no key 'lily'; its default is 0" in missing.stderr

    read = running.run("consume words --from start --limit 3")
    assert read.returncode == 0, read.stderr
    assert [line.split()[1:] for line in read.stdout.splitlines()] == [["rose", "rose"]] * 3


def test_the_only_instances_app_is_found_from_any_folder(running: Place) -> None:
    elsewhere = running.runtime / "elsewhere"
    elsewhere.mkdir(exist_ok=True)

    def run(line: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            running.command(line),
            cwd=elsewhere,
            env=running.environment,
            capture_output=True,
            text=True,
            timeout=30,
        )

    sent = run("send words tulip -k tulip")

    assert sent.returncode == 0, sent.stderr
    eventually(lambda: run("table counts tulip").stdout == "1\n")
    read = run("consume words --from start --limit 1")
    assert read.returncode == 0, read.stderr


def test_a_reply_of_an_agent_that_never_replies_is_not_waited_for(running: Place) -> None:
    asked = running.run("send @count_words x --wait")

    assert asked.returncode == 2
    assert "agent 'count_words' never replies: it yields nothing" in asked.stderr


def test_lines_of_stdin_are_sent(running: Place) -> None:
    sent = running.run("send words - -k many", input="a\nb\nc\n")

    assert sent.returncode == 0, sent.stderr
    assert len(sent.stdout.splitlines()) == 3


def test_an_agents_reply_is_printed(running: Place) -> None:
    asked = running.run("send @double 21 --wait")

    assert (asked.returncode, asked.stdout) == (0, "42\n"), asked.stderr


def test_a_wrong_value_or_name_is_refused(running: Place) -> None:
    wrong = running.run("send @double many")
    assert wrong.returncode == 1
    assert "'many' is no int" in wrong.stderr

    nobody = running.run("send @triple 3")
    assert nobody.returncode == 2
    assert "no agent is named 'triple'\n  there is @count_words\n" in nobody.stderr


# The app's own commands.


def test_an_own_command_sends_and_its_int_is_the_exit_code(running: Place) -> None:
    produced = running.run("produce iris --times 4 -A proj")

    assert (produced.returncode, produced.stdout) == (7, "sent iris\n"), produced.stderr
    eventually(lambda: running.run("table counts iris").stdout == "4\n")


def test_own_commands_stand_in_the_help_and_are_suggested(running: Place) -> None:
    assert "From proj:" in running.run("-A proj --help").stdout
    assert "  produce  Send a word." in running.run("-A proj --help").stdout
    assert "[default: 2]" in running.run("-A proj produce -h").stdout
    wrong = running.run("-A proj prodce iris")
    assert wrong.returncode == 2
    assert "Did you mean 'produce'?" in wrong.stderr


def test_a_failing_own_command_shows_the_users_frames(running: Place) -> None:
    failed = running.run("-A proj divide")

    assert failed.returncode == 1
    assert "Error: command 'divide' failed: ZeroDivisionError" in failed.stderr
    assert 'proj.py", line' in failed.stderr
    assert "cli/own.py" not in failed.stderr


def test_a_daemon_command_goes_on_until_a_signal(running: Place) -> None:
    daemon = running.spawn("-A proj watch")
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == "watching\n"

    assert daemon.poll() is None
    daemon.terminate()
    assert daemon.wait(timeout=10) == 0
    daemon.stdout.close()
    eventually(lambda: running.run("table counts seen").stdout == "1\n")


def test_a_script_with_app_main_is_the_command(running: Place) -> None:
    def script(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "proj.py", *words],
            cwd=running.folder,
            env=running.environment,
            capture_output=True,
            text=True,
            timeout=30,
        )

    assert "usage: proj.py" in script("--help").stdout.lower()
    assert "proj.count_words" in script("agents").stdout
    assert script("produce", "tulip", "--times", "1").returncode == 7


def test_a_script_with_app_main_is_a_worker(here: Place) -> None:
    worker = subprocess.Popen(
        [sys.executable, "proj.py", "worker", "-l", "info", "-p", "0"],
        cwd=here.folder,
        env=here.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(here.runs)
    finally:
        worker.terminate()
        assert worker.wait(timeout=15) == 0


def test_commands_work_on_the_log_where_nothing_runs(here: Place) -> None:
    assert here.run("-A proj produce rose").returncode == 7
    sent = here.run("-A proj send words rose -k rose")
    assert sent.returncode == 0, sent.stderr

    read = here.run("-A proj consume words --from start")
    assert read.stdout.count("rose  rose") == 3
    assert "proj does not run" in read.stderr

    dry = here.run("-A proj reset --dry-run")
    assert "Would delete" in dry.stderr
    assert "tables counts" in dry.stderr
    refused = here.run("-A proj reset")
    assert refused.returncode == 2
    assert "add --yes" in refused.stderr
    assert here.run("-A proj reset --yes").returncode == 0


def test_reset_counts_the_log_again(here: Place) -> None:
    here.run("-A proj produce rose")
    for begin in ("earliest", "latest"):
        options = f"--consumer-auto-offset-reset={begin}"
        assert here.run(f"start -A proj -p 0 {options}").returncode == 0
        eventually(lambda: here.run("table counts rose").stdout == "2\n")
        assert here.run("stop").returncode == 0
        done = here.run("reset -A proj --yes")
        assert done.returncode == 0, done.stderr
        assert "is read again from offset 0" in done.stdout


# Terminal.


def test_columns_are_coloured_on_a_terminal_only(running: Place) -> None:
    assert "\x1b[" not in running.run("ps").stdout
    assert "\x1b[32m" in terminal_output(running, "ps", {"TERM": "xterm"})
    assert "\x1b[" not in terminal_output(running, "ps", {"TERM": "xterm", "NO_COLOR": "1"})


def terminal_output(here: Place, line: str, variables: dict[str, str]) -> str:
    ours, theirs = pty.openpty()
    shown = subprocess.Popen(
        here.command(line),
        cwd=here.folder,
        env={**here.environment, **variables},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(ours, 4096):
            output += chunk
    os.close(ours)
    shown.wait(timeout=10)
    return output.decode()


def test_help_and_status_are_quick(running: Place) -> None:
    def span_s(line: str) -> float:
        began = time.monotonic()
        running.run(line)
        return time.monotonic() - began

    # The machine may have something else to do for a while.
    assert any(span_s("--help") < 0.150 for _ in range(30))
    assert any(span_s("status") < 0.250 for _ in range(30))


def test_logs_f_goes_on_over_the_end_of_the_instance() -> None:
    with place(PROJ) as here:
        assert here.run("start -A proj -p 0 --without-web").returncode == 0
        following = here.spawn("logs -f -n 0 -p master --name proj")
        try:
            assert following.stdout is not None
            stdout = following.stdout.fileno()
            os.set_blocking(stdout, False)
            shown = [b""]

            def says(text: bytes) -> bool:
                with contextlib.suppress(BlockingIOError):
                    shown[0] += os.read(stdout, 65536)
                return text in shown[0]

            # Until it follows, nothing is shown.
            eventually(
                lambda: here.run("restart double").returncode == 0 and says(b"double"), 30
            )
            assert here.run("stop --name proj").returncode == 0
            eventually(lambda: says(b"proj has ended; what it says when it runs again follows"))
            shown[0] = b""
            assert here.run("start -A proj -p 0 --without-web").returncode == 0
            eventually(lambda: says(b"proj is ready after"))
        finally:
            following.send_signal(signal.SIGINT)
            following.communicate(timeout=10)
        assert following.returncode == 130


def test_all_lines_since_a_moment_are_shown_and_cannot_move_the_cursor() -> None:
    source = PROJ + (
        "\n@app.task\nasync def talk():\n"
        "    for number in range(200):\n        print(f'\\x1b[2Jline {number}')\n"
    )
    with place(source) as here:
        assert here.run("start -A proj -p 0 --without-web").returncode == 0
        eventually(lambda: "line 199" in here.run("logs --name proj").stdout)

        assert len(here.run("logs --name proj app").stdout.splitlines()) == 50
        lines = here.run("logs --name proj app --since 1h").stdout.splitlines()
        assert [line.split("app#0 ")[1] for line in lines] == [
            f"\\x1b[2Jline {number}" for number in range(200)
        ]


@pytest.mark.parametrize(
    "command", ["check", "config", "config --json", "topics", "send double 1"]
)
def test_no_command_shows_the_password_of_a_broker(command: str) -> None:
    with place(PROJ) as here:
        broker = "kafka://ann:hunter22@127.0.0.1:1;ann:hunter22@127.0.0.1:2"

        done = here.run(f"{command} -A proj --broker {broker}")

        assert "hunter" not in done.stdout + done.stderr
        if command.startswith("c"):
            assert "kafka://ann:***@127.0.0.1:1;ann:***@127.0.0.1:2" in done.stdout
