"""Forking for the parent: whose child it is, and that it is a whole process."""

import platform
import subprocess
import sys
import textwrap

import pytest

from streamd.agentproc import forking

# Who forks ends first with 0; the child, adopted by nobody, is this script's from birth.
PARENT = """
import os, sys, threading
from streamd.agentproc import forking

here = os.getpid()
if os.fork() == 0:
    assert forking.is_possible()
    between = os.getpid()
    ran = []
    os.register_at_fork(
        before=lambda: ran.append("before"), after_in_child=lambda: ran.append("child")
    )
    child = forking.fork_for_parent()
    if child:
        os.write(1, b"told %d\\n" % child)
        try:
            os.waitpid(child, 0)
        except ChildProcessError:
            os._exit(0)
        os._exit(1)
    BODY
    os._exit(7)
ends = {}
for _ in range(2):
    pid, status = os.wait()
    ends[pid] = os.waitstatus_to_exitcode(status)
print("ends", sorted(ends.values()), flush=True)
"""

needs_clone = pytest.mark.skipif(
    not forking.tid_address() or platform.machine() != "x86_64", reason="needs x86-64 and glibc"
)


def run(body: str) -> list[str]:
    source = PARENT.replace(
        "    BODY\n", textwrap.indent(textwrap.dedent(body).strip() + "\n", "    ")
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_clone
def test_the_child_is_the_parents_who_sees_its_end() -> None:
    told = run("assert os.getppid() == here and os.getpid() not in (here, between)")

    assert told[-1] == "ends [0, 7]"


@needs_clone
def test_the_child_is_a_whole_process_with_threads_forks_and_an_id_of_its_own() -> None:
    told = run(
        """
        assert forking.tid_address()  # it holds the id of this process
        seen = []
        thread = threading.Thread(target=lambda: seen.append(threading.get_native_id()))
        thread.start()
        thread.join()
        assert seen and seen[0] != os.getpid()
        below = os.fork()
        if below == 0:
            os._exit(forking.tid_address() == 0)
        assert os.waitpid(below, 0)[1] == 0
        again = os.fork()
        if again == 0:
            os._exit(forking.fork_for_parent() == 0)
        for _ in range(2):
            os.wait()
        """
    )

    assert told[-1] == "ends [0, 7]"


@needs_clone
def test_what_was_registered_to_run_at_a_fork_runs() -> None:
    told = run('assert ran == ["before", "child"], ran')

    assert told[-1] == "ends [0, 7]"


@needs_clone
def test_a_process_with_threads_cannot() -> None:
    source = """
import threading, time
from streamd.agentproc import forking
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print(forking.is_possible(), flush=True)
import os; os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, timeout=60)

    assert done.stdout == b"False\n"
