"""Bad input, as a table: what a person gets is one sentence, a way out, and an exit code."""

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from examples_instance import Instance, eventually

HEAD = "import streamd\napp = streamd.App('x')\n"
TABLES = HEAD + "t = app.Table('t', default=int)\nu = app.Table('u', default=int)\n"
AGENT = """
@app.agent({options})
async def {name}(stream):
    async for x in stream:
        {work}
"""


def agent(name: str, work: str = "pass", options: str = "") -> str:
    """The source of an agent."""
    return AGENT.format(name=name, work=work, options=options)


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path: sockets are made below it."""
    path = Path(tempfile.mkdtemp(prefix="bi-"))
    yield path
    shutil.rmtree(path)


def made(place: Path, source: str) -> Instance:
    """An app of this source, not started."""
    (place / "app_x.py").write_text(source)
    return Instance(place, "app_x")


def told(instance: Instance, *words: str) -> tuple[int, str]:
    """Exit code of a command, and what it wrote to stderr."""
    done = subprocess.run(
        instance.command(*words), cwd=instance.place, env=instance.environment,
        capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stderr


# (what, source of the app, words of the sentence)
SOURCES = [
    ("missing import", "import no_such_module",
     "No module named 'no_such_module' (app_x.py:1)"),
    ("syntax error", "def x(:", "SyntaxError: invalid syntax (app_x.py, line 1)"),
    ("error inside", "def f():\n    return 1 / 0\nf()", "division by zero (app_x.py:2)"),
    ("no app", "number = 3", "app_x has no 'app'"),
    ("app is no App", "app = 3", "is an int, not an App"),
    ("two agents", HEAD + agent("a", options="name='n'") + agent("b", options="name='n'"),
     "two agents are named 'n': give one of them name="),
    ("two tables", TABLES + "v = app.Table('t')", "two tables are named 't'"),
    ("reserved name", HEAD + agent("web"), "a group cannot be named 'web'"),
    ("two writers",
     TABLES + agent("a", "t[x] = 1", "group='g'") + agent("b", "t[x] = 2", "group='h'"),
     "table 't' is written in 2 groups: g (agent app_x.a), h (agent app_x.b)"),
    ("foreign writer",
     TABLES + agent("a", "t[x] = 1") + agent("b", "u[x] = 1")
     + "@app.page('/p/')\nasync def p(web, request):\n    t['x'] = u['x']\n",
     "page '/p/' writes table 't', which belongs to group 'a'; it runs in 'app'"),
    ("partition counts",
     TABLES + "one = app.topic('one', partitions=2)\ntwo = app.topic('two', partitions=3)\n"
     + agent("a", "t[x] = 1", "one") + agent("b", "t[x] = 2", "two"),
     "reads topics of different partition counts: one has 2, two has 3"),
    ("cron text", HEAD + "@app.crontab('99 * * * *')\nasync def c(): ...",
     "the cron text '99 * * * *' has '99' as its minute"),
    ("cron never", HEAD + "@app.crontab('0 0 31 2 *')\nasync def c(): ...",
     "names a day that never comes"),
    ("cron zone", HEAD + "@app.crontab('0 0 * * *', tz='Mars/Olympus')\nasync def c(): ...",
     "Mars/Olympus"),
    ("timer", HEAD + "@app.timer(0)\nasync def c(): ...",
     "expected a number of seconds above 0"),
    ("unknown setting", "import streamd\napp = streamd.App('x', web_prot=1)",
     "unknown setting 'web_prot' (App(web_prot=...)); did you mean 'web_port'?"),
    ("wrong value", "import streamd\napp = streamd.App('x', grace='soon')",
     "grace is 'soon' (App(grace=...)); expected a duration such as 500ms"),
    ("app id", "import streamd\napp = streamd.App('a b')",
     "the app id 'a b' cannot name topics"),
    ("changed on_error", HEAD + agent("a", options="on_error='ignore'"),
     "has on_error='ignore': expected retry, stop, skip"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "sentence"), [s[1:] for s in SOURCES], ids=[s[0] for s in SOURCES]
)
def test_an_app_that_cannot_run_is_one_sentence_and_78(
    place: Path, source: str, sentence: str
) -> None:
    code, said = told(made(place, source), "start", "-p", "0")

    assert code == 78
    errors = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and sentence in errors[0], said
    assert "streamd/agentproc" not in said and "importlib" not in said


GOOD = HEAD + agent("a", options="value_type=int")

# (words, exit code, words of the answer)
COMMANDS = [
    (
        ["strt"],
        2,
        "no such command 'strt'. (Did you mean one of: 'restart', 'start', 'status'?)",
    ),
    (["worker", "--frobnicate"], 2, "no such option '--frobnicate'"),
    (["worker", "-p", "99999"], 2, "99999 is not in the range"),
    (["worker", "--grace", "soon"], 78, "grace is 'soon' (option --grace)"),
    (["send", "@nobody", "1"], 2, "no agent is named 'nobody'"),
    (["send", "@a", "text"], 1, "'text' is no int"),
    (["status"], 3, "does not run"),
    (["ps"], 3, "does not run"),
    (["logs"], 3, "does not run"),
    (["table", "t"], 3, "does not run"),
]


@pytest.mark.parametrize(
    ("words", "code", "sentence"), COMMANDS, ids=[" ".join(c[0]) for c in COMMANDS]
)
def test_a_wrong_command_is_one_sentence_and_its_code(
    place: Path, words: list[str], code: int, sentence: str
) -> None:
    instance = made(place, GOOD)

    assert sentence in (answer := told(instance, *words))[1], answer
    assert answer[0] == code


def test_a_wrong_environment_is_named_and_a_strange_one_is_a_warning(place: Path) -> None:
    instance = made(place, GOOD)

    instance.environment["STREAMD_GRAACE"] = "3"
    assert "no setting; did you mean STREAMD_GRACE?" in instance.run("check")
    instance.environment["STREAMD_GRACE"] = "soon"
    code, said = told(instance, "worker", "-p", "0")

    assert code == 78
    assert "Error: grace is 'soon' (environment STREAMD_GRACE); expected a duration" in said
    assert "Try: correct or unset STREAMD_GRACE" in said


def test_a_wrong_settings_file_is_named_with_its_line(place: Path) -> None:
    instance = made(place, GOOD)
    (place / "streamd.toml").write_text("web_bind = '127.0.0.1'\nweb_prot = 1\n")

    code, said = told(instance, "worker", "-p", "0")

    assert code == 78
    assert "unknown setting 'web_prot'" in said and "streamd.toml:2" in said


def test_a_taken_port_is_told_with_ways_out(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])

        code, said = told(made(place, GOOD), "start", "-p", port)

    assert code == 75
    assert f"port {port} on 127.0.0.1 is taken" in said
    assert "-p 0" in said and "--without-web" in said


def test_a_second_one_is_refused_with_the_cure_and_the_first_goes_on(place: Path) -> None:
    instance = made(place, GOOD)
    instance.run("start", "-p", "0")
    try:
        again = subprocess.run(
            instance.command("start", "-p", "0"), cwd=place, env=instance.environment,
            capture_output=True, text=True,
        )  # fmt: skip
        worker = told(instance, "worker", "-p", "0")
        other = told(instance, "--name", "other", "worker", "-p", "0")
        reset = told(instance, "reset", "--yes")
    finally:
        instance.run("stop")
        instance.close()

    assert again.returncode == 0 and "Already running" in again.stdout + again.stderr
    assert worker[0] == 75 and "scale" in worker[1]
    assert other[0] == 75 and "data" in other[1] and "scale" in other[1]
    assert reset[0] == 75 and "is running" in reset[1]


def test_a_second_worker_needs_a_data_directory_and_a_port_of_its_own(place: Path) -> None:
    instance = made(place, GOOD)
    instance.run("start", "-p", "0")
    try:
        told_by = instance.run("--datadir", str(place / "worker2"), "start", "-p", "0")
        running = sorted(path.parent.name for path in place.glob("run/*/control.sock"))
        instance.run("stop", "--name", "app_x@worker2")
    finally:
        instance.run("stop", "--name", "app_x")
        instance.close()

    assert "Running." in told_by
    assert running == ["app_x", "app_x@worker2"]


def test_a_changed_partition_count_is_refused(place: Path) -> None:
    instance = made(
        place, HEAD + "t = app.topic('t', partitions=2)\n" + agent("a", options="t")
    )
    instance.run("start", "-p", "0")
    instance.run("stop")
    made(place, HEAD + "t = app.topic('t', partitions=3)\n" + agent("a", options="t"))

    code, said = told(instance, "start", "-p", "0")

    assert code == 78
    assert "'t'" in said and "2" in said and "3" in said and "partitions" in said


def test_a_damaged_log_is_refused_with_a_sentence(place: Path) -> None:
    instance = made(place, GOOD)
    instance.run("start", "-p", "0")
    for number in range(20):
        instance.run("send", "@a", str(number))
    instance.run("stop")
    log = place / "data" / "log.db"
    content = bytearray(log.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    log.write_bytes(content)

    code, said = told(instance, "start", "-p", "0")

    assert code == 78
    assert len([line for line in said.splitlines() if line.startswith("Error: ")]) == 1, said


EVENTS = (
    HEAD.replace("'x'", "'x', retry_backoff=0.01, topic_partitions=2")
    + """
import ctypes, os

numbers = app.topic("numbers", value_type=int)
done = app.topic("done", value_type=int, partitions=1)
seen = app.Table("seen", default=int)
by_digit = app.Table("by_digit", default=int)

@app.agent(numbers, retries=1)
async def work(stream):
    async for number in stream:
        seen[number] += 1
        await done.send(value=number)
        if number == 13:
            raise ValueError("unlucky")
        if number == 66:
            os._exit(9)
        if number == 99:
            ctypes.string_at(0)

@app.agent(numbers, on_error="skip", group="skipper")
async def skipper(stream):
    async for number in stream:
        if number == 13:
            raise ValueError("skipped")
        await done.send(value=1000 + number)

@app.agent(numbers)
async def scatter(stream):
    async for number in stream:
        by_digit[str(number % 10)] += 1

@app.page("/digit/{digit}/")
@app.table_route(table=by_digit, match_info="digit")
async def digit(web, request, digit):
    return web.json(by_digit[digit])
"""
)


def test_bad_events_end_in_the_dead_letters_and_the_others_go_on(place: Path) -> None:
    instance = made(place, EVENTS)
    instance.run("start", "-p", "0")
    try:
        bad = subprocess.run(
            instance.command("send", "numbers", "-"), cwd=place, env=instance.environment,
            input="\n".join(map(str, [*range(10), 13, 66, 99, *range(20, 30)])),
            capture_output=True, text=True,
        )  # fmt: skip
        assert bad.returncode == 0, bad.stderr

        def letters() -> list[str]:
            said = instance.run(
                "consume", "x-dead-letters", "--from", "start", "--limit", "3", code=None
            )
            return said.splitlines() if len(said.splitlines()) >= 3 else []

        eventually(letters, 30.0)
        text = "\n".join(letters())
        status = instance.run("--json", "status")
        kept = instance.run("--json", "table", "seen", "--limit", "100")
        scattered = instance.run("logs", "-n", "400")
    finally:
        instance.run("stop")
        instance.close()

    assert all(f"{number}" in text for number in (13, 66, 99)), text
    assert '"FATAL"' not in status
    for number in [*range(10), *range(20, 30)]:
        assert (
            f'"key": "{number}", "value": 1' in kept or f'"key": {number}, "value": 1' in kept
        )
    assert '"key": 13,' not in kept and '"key": "13"' not in kept
    for table in ("seen", "by_digit"):
        assert scattered.count(f"table {table} holds keys outside of the partition") == 1
