import asyncio
import gc
import os
import subprocess
import sys
from types import FunctionType
from typing import Any

import uvloop

from streamd.agentproc import zygote  # noqa: F401 - imports what a zygote does
from streamd.agentproc.sharing import (
    HOT,
    gather_code,
    give_back_zeros,
    number_modules_and_classes,
)


def test_what_is_allocated_after_the_holes_are_filled_lies_at_the_end_of_the_heap() -> None:
    # In a process of its own: the holes are filled for ever.
    program = """
import ctypes
from streamd.agentproc.sharing import fill_holes
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_size_t
libc.free.argtypes = [ctypes.c_size_t]
sizes = [24, 100, 1000, 10000]
pieces = [libc.malloc(size) for _ in range(500) for size in sizes]
for piece in pieces[::2]:
    libc.free(piece)
end = libc.sbrk(0)
filled = fill_holes()
print(filled > 250 * 1100, sum(libc.malloc(size) < end for _ in range(50) for size in sizes))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["True", "0"]


def test_a_loop_gives_its_read_buffer_back_and_reads_all_the_same() -> None:
    loop = uvloop.new_event_loop()
    given_bytes = give_back_zeros(loop)
    data = os.urandom(1_000_000)

    async def read() -> bytes:
        process = await asyncio.create_subprocess_exec(
            "cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        echoed, _ = await process.communicate(data)
        return echoed

    echoed = loop.run_until_complete(read())
    loop.close()

    assert given_bytes > 200_000
    assert echoed == data


def test_gathered_functions_work_as_before_with_code_of_their_own() -> None:
    def outer(word: str) -> list[str]:
        return [inner(letter) for letter in word]

    def inner(letter: str, *, times: int = 2) -> str:
        return letter * times

    before = outer.__code__, inner.__code__
    found = gather_code(
        [f"{__name__}:{outer.__qualname__}", f"{__name__}:{inner.__qualname__}"]
    )

    assert found == 2
    assert outer("ab") == ["aa", "bb"]
    assert (outer.__code__, inner.__code__) == before
    assert outer.__code__ is not before[0]
    assert inner.__code__ is not before[1]


def test_gathered_functions_keep_their_texts_and_a_name_that_was_given_to_them() -> None:
    def speak() -> str:
        return "a text, not a name"

    before = speak.__code__.co_consts[1]
    speak.__qualname__ = "speaks <anew>"
    gather_code([f"{__name__}:{speak.__code__.co_qualname}"])

    assert speak() == before
    assert speak() is not before
    assert speak.__qualname__ == "speaks <anew>"


def test_each_class_has_its_number_before_the_forks_and_no_code_of_it_runs_for_that() -> None:
    ran: list[str] = []

    class Meta(type):
        def __getattribute__(cls, name: str) -> Any:
            ran.append(name)
            return super().__getattribute__(name)

        def __getattr__(cls, name: str) -> Any:
            ran.append(name)
            raise AttributeError(name)

    class Numbered(metaclass=Meta):
        pass

    before = type.__dict__["__flags__"].__get__(Numbered)
    number_modules_and_classes()
    after = type.__dict__["__flags__"].__get__(Numbered)

    has_number = 1 << 19  # Py_TPFLAGS_VALID_VERSION_TAG
    assert (before & has_number, after & has_number) == (0, has_number)
    assert ran == []


def test_the_list_of_hot_functions_names_what_is_there() -> None:
    # Else run scripts/hot: each function that is missing costs some memory in each process.
    named = [name for name in HOT.read_text().split() if name.startswith("streamd.")]
    there = {
        f"{function.__module__}:{function.__code__.co_qualname}"
        for function in gc.get_objects()
        if isinstance(function, FunctionType)
    }
    top = [name for name in named if "<" not in name]

    missing = [name for name in top if name not in there]

    assert len(top) > 200
    assert len(missing) < len(top) / 10, missing


def test_the_names_of_hot_functions_lie_side_by_side_when_a_zygote_starts() -> None:
    program = """
import runpy
import sys
started = runpy.run_path(sys.argv[1], run_name="start")
from streamd.agentproc.intake import Intake
ours = {id(name) for name in started["NAMES"]}
used = [id(name) for name in Intake.run.__code__.co_names]
print(len({address >> 12 for address in ours}), sum(name in ours for name in used), len(used))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(HOT.with_name("start.py"))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    pages, named, used = map(int, done.stdout.split())
    assert pages < 300
    assert named > used / 2
