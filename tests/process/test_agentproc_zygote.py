"""The zygote: what it says of an app, and of one that cannot be imported."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agentproc_master import Master, become_subreaper, eventually

GOOD = """
import os
from streamd.app import App
print("importing in", os.getcwd())
app = App("proj")
"""

StartMaster = Callable[..., Master]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartMaster]:
    become_subreaper()
    masters: list[Master] = []

    def start_master(source: str, **environ: str) -> Master:
        masters.append(Master(tmp_path, source, **environ))
        return masters[-1]

    yield start_master
    for master in masters:
        master.close()


def test_hello_says_what_the_app_is_with_its_settings(start: StartMaster) -> None:
    source = (
        GOOD
        + """
numbers = app.topic("numbers", value_type=int)
sums = app.Table("sums", default=int)

@app.agent(numbers)
async def add(stream):
    async for number in stream:
        sums["all"] += number
"""
    )
    master = start(source, STREAMD_GRACE="7s")

    hello = master.import_app(web_port="7777")

    assert hello.app_id == "proj"
    assert [group.name for group in hello.groups] == ["add", "app"]
    assert hello.settings["web_port"] == 7777
    assert hello.settings["grace"] == 7.0
    assert hello.warnings == []


def test_import_happens_in_the_working_folder_and_its_prints_are_lines(
    start: StartMaster, tmp_path: Path
) -> None:
    master = start(GOOD)

    master.import_app()

    assert master.text() == f"importing in {tmp_path}\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("import no_such_module", "no_such_module", id="missing-module"),
        pytest.param("def broken(:", "SyntaxError", id="syntax"),
        pytest.param("raise ValueError('bad day')", "bad day", id="raises"),
        pytest.param("import sys; sys.exit(5)", "sys.exit(5)", id="exits"),
        pytest.param("raise KeyboardInterrupt", "KeyboardInterrupt", id="interrupted"),
        pytest.param("x = 1", "app", id="no-app"),
        pytest.param(
            "from streamd.app import App\napp = App('proj', broker='carrier-pigeon://')",
            "carrier-pigeon",
            id="bad-setting",
        ),
    ],
)
def test_app_that_cannot_be_imported_is_explained_and_ends_the_zygote_with_78(
    start: StartMaster, source: str, expected: str
) -> None:
    master = start(source)

    failed = master.import_failure()

    assert expected in failed.message
    assert failed.exit_code == 78
    assert master.zygote.wait(10) == 78


def test_traceback_of_a_failed_import_has_only_frames_of_the_user(start: StartMaster) -> None:
    failed = start("def deeper():\n    raise ValueError\n\ndeeper()\n").import_failure()

    shown = "\n".join(failed.seen) + failed.traceback
    assert "proj.py" in shown and "in deeper" in shown
    assert "importlib" not in shown and "zygote.py" not in shown


def test_threads_of_the_import_are_named_in_a_warning(start: StartMaster) -> None:
    source = (
        GOOD
        + """
import threading, time
threading.Thread(target=time.sleep, args=(60,), name="poller of mine", daemon=True).start()
"""
    )
    hello = start(source).import_app()

    assert [warning for warning in hello.warnings if "poller of mine" in warning]


def test_zygote_has_one_thread_and_ends_with_the_link(start: StartMaster) -> None:
    master = start(GOOD)
    master.import_app()
    assert len(os.listdir(f"/proc/{master.zygote.pid}/task")) == 1

    master.end.close()

    assert master.zygote.wait(5) == 0


def test_usr1_shows_what_an_import_hangs_on(start: StartMaster) -> None:
    master = start("import time\ndef hangs():\n    print('now')\n    time.sleep(60)\nhangs()\n")
    master.send_import()
    eventually(lambda: "now" in master.text())

    master.zygote.send_signal(signal.SIGUSR1)

    eventually(lambda: "in hangs" in master.text())
    master.zygote.kill()


def test_forks_asked_for_at_once_are_all_made_in_order(start: StartMaster) -> None:
    master = start(GOOD)
    master.import_app()
    master.declare()

    children = master.fork_all(master.plan(f"app#{number}") for number in range(20))

    assert len({child.pid for child in children}) == 20
    for child in children:
        child.wait_ready()
        assert f"app#{children.index(child)}" in Path(f"/proc/{child.pid}/comm").read_text()


def test_fork_that_fails_is_reported_and_the_zygote_goes_on(start: StartMaster) -> None:
    source = (
        GOOD
        + """
import os
from streamd.agentproc import forking
left = [1]

def failing_once(real):
    def fork():
        if left.pop() if left else 0:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real()
    return fork

os.fork = failing_once(os.fork)
forking.fork_for_parent = failing_once(forking.fork_for_parent)
"""
    )
    master = start(source)
    master.import_app()
    master.declare()

    error = master.fork_failure(master.plan())

    assert error == "fork failed: Resource temporarily unavailable (EAGAIN)"
    master.fork().wait_ready()


def test_a_zygote_with_threads_forks_twice_and_the_master_owns_the_child(
    start: StartMaster,
) -> None:
    threads = """
import threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
"""
    master = start(GOOD + threads)
    master.import_app()
    master.declare()

    child = master.fork().wait_ready()

    eventually(lambda: parent_of(child.pid) == os.getpid())
    child.signal(signal.SIGTERM)
    assert child.exit_code() == 0


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
