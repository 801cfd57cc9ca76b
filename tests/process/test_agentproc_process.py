"""Forked agent processes: birth, signals, exit codes, dumps, what they answer, what is left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import agentproc_master
import msgspec
import pytest
from agentproc_master import Child, Master, become_subreaper, eventually, talk

from streamd.agentproc.beats import BEAT_S, Stage
from streamd.agentproc.reads import read_address
from streamd.agentproc.stacks import END_OF_TASKS
from streamd.wire import (
    Draining,
    DumpTasks,
    Failing,
    Found,
    GroupPlan,
    Lookup,
    LookupText,
    Missing,
    Moved,
    Open,
    Owner,
    Owners,
    Owns,
    PageReply,
    PageRequest,
    RoutedKey,
    RouteKey,
    Scan,
    Scanned,
    Stats,
    Unavailable,
)

IDLE = """
from streamd.app import App
app = App("proj")
"""

COUNT = """
from streamd.app import App
app = App("proj", topic_partitions=2)
words = app.topic("words", key_type=str, value_type=str)
counts = app.Table("counts", default=int, key_type=str, value_type=int)

@app.agent(words)
async def count(stream):
    async for word in stream:
        counts[word] += 1

@app.task
async def feed():
    for word in "the cat and the dog and the bird".split():
        await words.send(key=word, value=word)

@app.page("/count/{word}/")
@app.table_route(table=counts, match_info="word")
async def show(web, request, word):
    return web.json({word: counts[word]})

@app.page("/hello/")
async def hello(web, request):
    return web.text("hello")
"""

StartMaster = Callable[..., Master]


@pytest.fixture(autouse=True)
def adopting() -> None:
    become_subreaper()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartMaster]:
    masters: list[Master] = []

    def start_master(source: str) -> Master:
        master = Master(tmp_path, source)
        masters.append(master)
        master.import_app()
        return master.declare()

    yield start_master
    for master in masters:
        master.close()


def page(
    master: Master, path: str, route: int, partition: int = -1, **match_info: str
) -> PageRequest:
    number = master.hello.routes[route].id
    return PageRequest(number, partition, "GET", path, "", [], b"", match_info, "127.0.0.1")


def has_ended(pid: int) -> bool:
    """True once the process is gone; an adopted zombie is reaped."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return not Path(f"/proc/{pid}").exists()
    return False


# Birth.


def test_process_is_ready_soon_and_the_masters_own_child(start: StartMaster) -> None:
    master = start(IDLE)

    child = master.fork().wait_ready()

    status = Path(f"/proc/{child.pid}/status").read_text()
    assert f"PPid:\t{os.getpid()}\n" in status
    assert os.getsid(child.pid) == child.pid
    assert child.fields()[4] == Stage.RUNNING


def test_process_has_no_blocked_signals_and_dies_with_its_master(start: StartMaster) -> None:
    source = (
        IDLE
        + """
import asyncio, ctypes, signal, threading

@app.task
async def tell():
    value = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(value), 0, 0, 0)
    masks = [signal.pthread_sigmask(signal.SIG_BLOCK, ())]
    thread = threading.Thread(
        target=lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
    thread.start()
    thread.join()
    print("pdeathsig", value.value, "masks", masks)
"""
    )
    child = start(source).fork().wait_ready()

    child.wait_logged("masks")
    assert "pdeathsig 9 masks [set(), set()]" in child.log()


def test_process_is_found_by_the_trees_marker_and_shows_its_name(start: StartMaster) -> None:
    child = start(IDLE).fork().wait_ready()

    assert (
        b"STREAMD_TREE=tree-of-this-test\0" in Path(f"/proc/{child.pid}/environ").read_bytes()
    )
    assert Path(f"/proc/{child.pid}/comm").read_text() == "app#0\n"


def test_process_holds_only_its_own_ends(start: StartMaster) -> None:
    master = start(IDLE)
    first = master.fork().wait_ready()

    second = master.fork(master.plan("app#1")).wait_ready()

    links = {
        os.readlink(f"/proc/{first.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{first.pid}/fd")
    }
    mine = {
        os.readlink(f"/proc/{second.pid}/fd/{fd}")
        for fd in os.listdir(f"/proc/{second.pid}/fd")
    }
    zygote = {
        os.readlink(f"/proc/{master.zygote.pid}/fd/{fd}")
        for fd in os.listdir(f"/proc/{master.zygote.pid}/fd")
    }
    named = {link for link in links & mine if link.startswith(("socket:", "pipe:"))}
    assert not named
    assert not {link for link in zygote & mine if link.startswith("socket:")}


def test_forked_processes_draw_different_random_numbers(start: StartMaster) -> None:
    source = (
        IDLE
        + """
import random
random.seed(1)

@app.task
async def draw():
    print("drew", random.random())
"""
    )
    master = start(source)

    logs = []
    for number in range(2):
        child = master.fork(master.plan(f"app#{number}")).wait_ready()
        child.wait_logged("drew")
        logs.append(child.log())

    assert logs[0] != logs[1]


def test_exit_codes_and_signals_of_fifty_instant_deaths_reach_the_master(
    start: StartMaster,
) -> None:
    source = (
        IDLE
        + """
import os, signal
from pathlib import Path

@app.task
async def die():
    code = int(Path("code").read_text())
    os.kill(os.getpid(), -code) if code < 0 else os._exit(code)
"""
    )
    master = start(source)
    codes = [0, 1, 5, 70, 127, 255, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT] * 3

    seen = []
    for code in codes:
        (master.folder / "code").write_text(str(code))
        seen.append(master.fork().exit_code())

    assert seen == codes


# Ending.


def test_term_ends_an_idle_process_with_0_at_once(start: StartMaster) -> None:
    child = start(IDLE).fork().wait_ready()
    at = time.monotonic()

    child.signal(signal.SIGTERM)

    assert child.exit_code() == 0
    assert time.monotonic() - at < 1.0
    assert child.fields()[4] == Stage.DRAINING


def test_term_that_comes_right_after_the_fork_is_not_lost(start: StartMaster) -> None:
    master = start(IDLE)

    children = [master.fork(master.plan(f"app#{number}")) for number in range(8)]
    for child in children:
        child.signal(signal.SIGTERM)

    assert [child.exit_code() for child in children] == [0] * 8


def test_term_at_any_moment_of_the_start_ends_with_0(start: StartMaster) -> None:
    master = start(COUNT)

    codes = []
    for step in range(30):
        child = master.fork(master.plan("count#0"))
        time.sleep(step * 0.0005)
        child.signal(signal.SIGTERM)
        codes.append(child.exit_code())

    assert codes == [0] * 30


def test_quit_at_any_moment_of_the_start_ends_with_3(start: StartMaster) -> None:
    master = start(COUNT)

    codes = []
    for step in range(30):
        child = master.fork(master.plan("count#0"))
        time.sleep(step * 0.0005)
        child.signal(signal.SIGQUIT)
        codes.append(child.exit_code())
        assert "Traceback" not in child.log()

    assert codes == [3] * 30


def test_term_lets_the_call_that_runs_finish_and_tells_what_drains(start: StartMaster) -> None:
    source = (
        IDLE
        + """
import asyncio

@app.timer(0.1)
async def slow():
    print("began")
    await asyncio.sleep(1.5)
    print("finished")
"""
    )
    child = start(source).fork().wait_ready()
    child.wait_logged("began")

    child.signal(signal.SIGTERM)
    child.signal(signal.SIGTERM)

    assert child.link.wait(Draining).left == ["timer slow"]
    assert child.exit_code() == 0
    assert child.log().count("finished") == 1
    assert child.log().count("began") == 1


def test_quit_ends_within_half_a_second_with_3_and_settles_nothing(start: StartMaster) -> None:
    source = COUNT.replace("counts[word] += 1", "await asyncio.sleep(60)").replace(
        "from streamd", "import asyncio\nfrom streamd", 1
    )
    master = start(source)
    child = master.fork(master.plan("count#0")).wait_ready()
    master.fork().wait_ready()
    eventually(lambda: child.fields()[2] > 0)
    at = time.monotonic()

    child.signal(signal.SIGQUIT)

    assert child.exit_code() == 3
    assert time.monotonic() - at < 0.5
    assert child.fields()[1] == 0
    assert "failed" not in child.log()


def test_int_does_not_reach_a_process(start: StartMaster) -> None:
    child = start(IDLE).fork().wait_ready()

    child.signal(signal.SIGINT)
    child.signal(signal.SIGTERM)

    assert child.exit_code() == 0


def test_end_of_the_link_ends_the_process_with_70(start: StartMaster) -> None:
    child = start(IDLE).fork().wait_ready()
    at = time.monotonic()

    child.link.socket.close()

    assert child.exit_code() == 70
    assert time.monotonic() - at < 0.5


def test_agent_that_stops_on_errors_tells_why_and_ends_with_its_code(
    start: StartMaster,
) -> None:
    source = COUNT.replace("counts[word] += 1", "raise ValueError('no ' + word)").replace(
        "@app.agent(words)", "@app.agent(words, on_error='stop')"
    )
    master = start(source)
    child = master.fork(master.plan("count#0"))
    master.fork()

    failing = child.link.wait(Failing)

    assert "ValueError: no " in failing.message
    assert child.exit_code() == failing.exit_code == 78


def test_bug_of_ours_is_logged_once_and_ends_with_1(start: StartMaster) -> None:
    master = start(IDLE)
    # No folder of that name: the log cannot be opened, which no StreamdError foresees there.
    address = str(master.folder / "no" / "socket")
    child = master.fork(msgspec.structs.replace(master.plan(), address=address))

    assert child.exit_code() == 1
    assert child.log().count("Traceback") == 1


def test_processes_outlive_their_zygote(start: StartMaster) -> None:
    master = start(IDLE)
    child = master.fork().wait_ready()
    beat = child.fields()[0]

    master.zygote.kill()
    master.zygote.wait()

    eventually(lambda: child.fields()[0] > beat)
    child.signal(signal.SIGTERM)
    assert child.exit_code() == 0


def test_nobody_outlives_the_master_whatever_it_does(tmp_path: Path) -> None:
    source = (
        IDLE
        + """
import time

@app.task
async def block():
    print("blocks")
    time.sleep(60)
"""
    )
    (tmp_path / "proj.py").write_text(source)
    script = str(Path(agentproc_master.__file__))
    master = subprocess.Popen(
        [sys.executable, script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert master.stdout is not None
    zygote, first, second = map(int, master.stdout.readline().split())
    master.stdout.close()
    pids = [zygote, first, second]
    assert all(Path(f"/proc/{pid}/exe").exists() for pid in pids)

    master.kill()
    master.wait()
    at = time.monotonic()

    eventually(lambda: all(map(has_ended, pids)))
    assert time.monotonic() - at < 1.0


# Beats and dumps.


def test_page_beats_while_the_loop_turns_and_stops_with_it(start: StartMaster) -> None:
    source = (
        IDLE
        + """
import time

@app.timer(1.0)
async def block():
    time.sleep(60)
"""
    )
    child = start(source).fork().wait_ready()
    first = child.fields()[0]

    eventually(lambda: child.fields()[0] > first)
    eventually(lambda: time.monotonic() - child.fields()[0] > 4 * BEAT_S)


def test_usr1_writes_threads_and_tasks_each_time(start: StartMaster) -> None:
    source = (
        IDLE
        + """
import asyncio

@app.task
async def waits_here():
    password = "hunter2"
    print("waits")
    await asyncio.sleep(60)
"""
    )
    child = start(source).fork().wait_ready()
    child.wait_logged("waits")

    for _ in range(2):
        os.ftruncate(child.dump, 0)
        child.signal(signal.SIGUSR1)
        eventually(lambda: END_OF_TASKS in child.dumped(), within_s=1.0)
        text = child.dumped()
        assert "most recent call first" in text
        assert "in waits_here" in text
        assert "hunter2" not in text and "\0" not in text

    child.link.send(DumpTasks())
    eventually(lambda: child.dumped().count(END_OF_TASKS) == 2, within_s=1.0)


@pytest.mark.parametrize(
    "stuck",
    [
        pytest.param("time.sleep(60)", id="loop-blocked"),
        pytest.param("ctypes.PyDLL(None).sleep(60)", id="gil-held-in-c"),
        pytest.param("while True: sum(range(1000))", id="busy"),
    ],
)
def test_usr1_shows_where_a_stuck_process_is(start: StartMaster, stuck: str) -> None:
    source = (
        IDLE
        + f"""
import ctypes, time

def gets_stuck():
    print("stuck", flush=True)
    {stuck}

@app.timer(0.05)
async def tick():
    gets_stuck()
"""
    )
    child = start(source).fork().wait_ready()
    child.wait_logged("stuck")

    child.signal(signal.SIGUSR1)

    eventually(lambda: "in gets_stuck" in child.dumped(), within_s=1.0)


def test_crash_in_c_leaves_its_stack_in_the_dump(start: StartMaster) -> None:
    source = (
        IDLE
        + """
import ctypes

@app.timer(0.05)
async def crashes_here():
    ctypes.string_at(0)
"""
    )
    child = start(source).fork()

    assert child.exit_code() == -signal.SIGSEGV
    assert "Segmentation fault" in child.dumped()
    assert "in crashes_here" in child.dumped()


# Working and answering.


def wait_counted(child: Child, events: int) -> None:
    eventually(lambda: child.fields()[1] >= events)
    eventually(
        lambda: (
            talk(child.plan.address, LookupText("counts", "the", -1)) == Found(b"3", 0)
            or talk(child.plan.address, LookupText("counts", "the", -1)) == Found(b"3", 1)
        )
    )


def test_events_are_counted_told_and_looked_up(start: StartMaster) -> None:
    master = start(COUNT)
    child = master.fork(master.plan("count#0"))
    assert child.link.wait(Owns) == Owns("count", 1, [0, 1], [])
    master.fork(master.plan("app#0"))
    wait_counted(child, 8)
    address = child.plan.address

    routed = talk(address, RouteKey("counts", "the"))
    assert isinstance(routed, RoutedKey)
    for where in (address, read_address(address)):
        found = talk(where, Lookup("counts", b'"the"', routed.partition))
        assert found == Found(b"3", routed.partition)
        assert talk(where, Lookup("counts", b'"cow"', -1)) == Missing(b"0")
        assert talk(where, Scan("counts", "b", 5)) == Scanned([('"bird"', "1")], 1)
        assert talk(where, LookupText("counts", "the", 7)) == Moved(1)
    eventually(lambda: child.link.wait(Stats).tables == {"counts": 5})


def test_page_of_a_table_is_answered_by_its_owner_and_by_nobody_else(
    start: StartMaster,
) -> None:
    master = start(COUNT)
    owner = master.fork(master.plan("count#0")).wait_ready()
    other = master.fork(master.plan("app#0")).wait_ready()
    wait_counted(owner, 8)

    partition = talk(owner.plan.address, RouteKey("counts", "the"))
    assert isinstance(partition, RoutedKey)
    reply = talk(
        owner.plan.address, page(master, "/count/the/", 0, partition.partition, word="the")
    )
    assert isinstance(reply, PageReply)
    assert json.loads(reply.body) == {"the": 3}
    assert isinstance(
        talk(owner.plan.address, page(master, "/count/the/", 0, 9, word="the")), Moved
    )
    assert isinstance(
        talk(other.plan.address, page(master, "/count/the/", 0, 0, word="the")), Moved
    )
    reply = talk(other.plan.address, page(master, "/hello/", 1))
    assert isinstance(reply, PageReply)
    assert reply.body == b"hello"


def test_all_groups_of_an_app_run_in_one_process(start: StartMaster) -> None:
    master = start(COUNT)
    groups = [GroupPlan("count", 0, 1), GroupPlan("app", 0, 1)]
    plan = msgspec.structs.replace(master.plan("worker#0"), groups=groups, alone=True)
    child = master.fork(plan).wait_ready()

    wait_counted(child, 8)
    child.signal(signal.SIGTERM)

    assert child.exit_code() == 0
    stats = [message for message in child.link.drain() if isinstance(message, Stats)]
    assert stats[-1].events == {"proj.count": 8}
    assert stats[-1].lag == {"proj.count": 0}


CROSS = """
from streamd.app import App
app = App("proj", topic_partitions=1)
lefts = app.topic("lefts", key_type=str, value_type=int)
rights = app.topic("rights", key_type=str, value_type=int)
left = app.Table("left", default=int, key_type=str, value_type=int)
right = app.Table("right", default=int, key_type=str, value_type=int)

@app.agent(lefts, group="left_group")
async def count_left(stream):
    async for value in stream:
        left["n"] += 1
        assert right["n"] >= 0

@app.agent(rights, group="right_group")
async def count_right(stream):
    async for value in stream:
        right["n"] += 1
        assert left["n"] >= 0

@app.task
async def feed():
    for number in range(300):
        await lefts.send(key="n", value=number)
        await rights.send(key="n", value=number)
"""


def test_groups_that_read_each_others_tables_do_not_block_each_other(
    start: StartMaster,
) -> None:
    master = start(CROSS)
    children = [
        master.fork(master.plan(name)) for name in ("left_group#0", "right_group#0", "app#0")
    ]

    for child, table in zip(children, ("left", "right"), strict=False):
        eventually(lambda: Path(child.plan.address).exists())  # noqa: B023
        eventually(
            lambda: talk(child.plan.address, LookupText(table, "n", -1)) == Found(b"300", 0)  # noqa: B023
        )
    assert [child.log() for child in children] == ["", "", ""]


def test_answer_of_the_reading_thread_comes_while_the_loop_is_blocked(
    start: StartMaster,
) -> None:
    source = (
        COUNT
        + """
import time

@app.page("/block/")
async def block(web, request):
    counts.get("x")
    time.sleep(60)
"""
    )
    master = start(source)
    child = master.fork(master.plan("count#0")).wait_ready()
    master.fork()
    wait_counted(child, 8)
    blocked = agentproc_master.connected(child.plan.address, page(master, "/block/", 2))
    eventually(lambda: time.monotonic() - child.fields()[0] > 2 * BEAT_S)

    answer = talk(read_address(child.plan.address), Lookup("counts", b'"the"', -1))

    assert isinstance(answer, Found) and answer.value == b"3"
    blocked.close()


WRITING = """
import asyncio
from streamd.app import App
app = App("proj", topic_partitions=1)
words = app.topic("words", key_type=str, value_type=str)
counts = app.Table("counts", default=int, key_type=str, value_type=int)

@app.agent(words, on_error="skip")
async def count(stream):
    async for word in stream:
        if word == "bad":
            raise ValueError(word)
        counts[word] += 1

@app.page("/add/")
async def add(web, request):
    counts["added"] += 1
    return web.json(counts["added"])

@app.page("/slow/")
async def slow(web, request):
    counts["slowly"] += 1
    print("waits")
    await asyncio.sleep(1.0)
    return web.json(counts["slowly"])

@app.page("/send/")
async def send(web, request):
    await words.send(key="k", value="bad")
    return web.text("sent")
"""


def test_what_a_page_wrote_is_durable_when_it_is_answered(start: StartMaster) -> None:
    master = start(WRITING)
    child = master.fork(master.plan("count#0")).wait_ready()

    for number in range(1, 4):
        reply = talk(child.plan.address, page(master, "/add/", 0))
        child.signal(signal.SIGKILL)

        assert isinstance(reply, PageReply) and json.loads(reply.body) == number
        assert child.exit_code() == -signal.SIGKILL
        child = master.fork(master.plan("count#0")).wait_ready()
        assert talk(child.plan.address, LookupText("counts", "added", 0)) == Found(
            str(number).encode(), 0
        )


def test_page_whose_writes_were_taken_back_is_not_answered_as_done(start: StartMaster) -> None:
    master = start(WRITING)
    child = master.fork(master.plan("count#0")).wait_ready()
    other = master.fork(master.plan("app#0")).wait_ready()
    asked = agentproc_master.connected(child.plan.address, page(master, "/slow/", 1))
    child.wait_logged("waits")

    reply = talk(other.plan.address, page(master, "/send/", 2))

    assert isinstance(reply, PageReply) and reply.status == 200
    assert isinstance(agentproc_master.answer_of(asked), Unavailable)


def test_page_that_runs_is_answered_before_a_warm_stop_ends(start: StartMaster) -> None:
    master = start(WRITING)
    child = master.fork(master.plan("count#0")).wait_ready()
    asked = agentproc_master.connected(child.plan.address, page(master, "/slow/", 1))
    child.wait_logged("waits")

    child.signal(signal.SIGTERM)
    eventually(lambda: child.fields()[4] == Stage.DRAINING)

    late = talk(child.plan.address, page(master, "/add/", 0))
    assert late == Unavailable("stopping", 1.0)
    reply = agentproc_master.answer_of(asked)
    assert isinstance(reply, PageReply) and json.loads(reply.body) == 1
    assert child.exit_code() == 0


def test_what_is_for_the_leader_runs_only_there(start: StartMaster) -> None:
    source = (
        IDLE
        + """
@app.timer(0.05)
async def everywhere():
    print("everywhere")

@app.timer(0.05, on_leader=True)
async def once():
    print("once")
"""
    )
    master = start(source)
    leader = master.fork(master.plan("app#0", leader=True)).wait_ready()
    other = master.fork(master.plan("app#1", leader=False)).wait_ready()

    leader.wait_logged("once")
    eventually(lambda: other.log().count("everywhere") >= 3)

    assert "once" not in other.log()


# The timer names tables of two groups, so it runs in `app`.
READING = (
    COUNT
    + """
others = app.Table("others", default=int)

@app.agent(app.topic("numbers"))
async def add(stream):
    async for number in stream:
        others["n"] += number

@app.timer(0.05)
async def read():
    try:
        print("read", counts["the"], await counts.lookup("the"), "beside", others.name)
    except Exception as error:
        print(error)
"""
)


def test_table_of_another_group_is_read_from_the_owner_that_the_master_names(
    start: StartMaster,
) -> None:
    master = start(READING)
    plan = master.plan("count#0")
    address = plan.address.replace("count#0", "elsewhere")
    owner = master.fork(msgspec.structs.replace(plan, address=address)).wait_ready()
    reader = master.fork(master.plan("app#0")).wait_ready()
    wait_counted(owner, 8)
    reader.wait_logged("count#0, which has the table counts, is not there")

    reader.link.send(Owners(1, [Owner("count", "count#0", address, 0, 1, [0, 1], [])]))

    reader.wait_logged("read 3 3 beside others")


def test_a_process_that_is_early_opens_nothing_before_it_is_told(start: StartMaster) -> None:
    master = start(COUNT)
    child = master.fork(msgspec.structs.replace(master.plan("count#0"), early=True))
    eventually(lambda: Path(read_address(child.plan.address)).exists())

    answer = talk(read_address(child.plan.address), Scan("counts", "", 1))
    opened = [os.readlink(path) for path in Path(f"/proc/{child.pid}/fd").iterdir()]
    child.link.send(Open())

    assert isinstance(answer, Unavailable)
    assert not [path for path in opened if path.endswith("log.db")]
    child.wait_ready()


def test_a_process_that_is_early_can_be_stopped(start: StartMaster) -> None:
    master = start(COUNT)
    child = master.fork(msgspec.structs.replace(master.plan("count#0"), early=True))
    eventually(lambda: Path(read_address(child.plan.address)).exists())

    child.signal(signal.SIGTERM)

    assert child.exit_code() == 0


@pytest.mark.parametrize(("source", "reads"), [(COUNT, True), (IDLE, False)])
def test_only_an_app_with_tables_has_a_thread_that_reads_them(
    start: StartMaster, source: str, reads: bool
) -> None:
    master = start(source)
    child = master.fork(master.plan("count#0" if reads else "app#0")).wait_ready()

    names = Path(f"/proc/{child.pid}/task").glob("*/comm")
    assert Path(read_address(child.plan.address)).exists() == reads
    assert len(list(names)) == 2 + reads  # the loop's, and the one that writes the log
