"""What the processes that a zygote forks share of its memory, and keep sharing.

A forked process has the pages of the zygote until it writes to them; then it has a copy of its
own. It writes to a page by as little as a reference to one object in it, and to pages with free
room by what it makes. So what a process would write to is put out of its way before the fork.
"""

import contextlib
import ctypes
import gc
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

# The functions that agent processes run, as `scripts/hot` found them. One that is missing, or
# is there no more, costs some memory and nothing else.
HOT = Path(__file__).with_name("hot.txt")

_MADV_DONTNEED = 4
# From what glibc takes apart from its heap down to the smallest piece, in its own steps.
_HOLES_BYTES = (*(1 << power for power in range(16, 10, -1)), *range(1032, 23, -16))
# CPython's, by the size of the object; smaller ones are few.
_POOL_BYTES = 16 * 1024
_SMALLEST_BYTES = 48
_LARGEST_POOLED_BYTES = 512
_POOLED_STEP_BYTES = 16
_CALLS_UNTIL_REWRITTEN = 20  # CPython 3.11's are 10
_PART_FREE = 20  # at most one in so many, of a size

_left: list[CodeType] = []  # replaced by copies
_fillings: list[bytes] = []

_libc = ctypes.CDLL(None, use_errno=True)
_libc.malloc.restype = _libc.sbrk.restype = ctypes.c_size_t
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_size_t]
_libc.sbrk.argtypes = [ctypes.c_ssize_t]
_libc.madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]


def prepare_for_forks() -> None:
    """Make ready what is there for the processes that are forked from now on.

    To be called once, with all imports done. Takes some thirty milliseconds.
    """
    number_modules_and_classes()
    # An entry of this cache holds the name that it is for: each one that a process replaces
    # would have it write to the page of a name that it has nothing to do with.
    sys._clear_type_cache()
    # It empties Python's lists of free objects too, which lie anywhere.
    gc.collect()
    # The copies of the code lie side by side only where no hole is left to put them in.
    fill_holes()
    fill_pools()
    gather_code(HOT.read_text().split())
    # A collection in a forked process must not write to what was there before.
    gc.freeze()


def number_modules_and_classes() -> None:
    """Have each module and class numbered.

    Code that has been called some times is rewritten for the module and the classes that it
    meets, by their numbers, which they get when that is done for the first time.
    """
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            # With code of its own: what is rewritten for one module is not for another.
            look_up = FunctionType(_name_of_module.__code__.replace(), module.__dict__)
            for _ in range(_CALLS_UNTIL_REWRITTEN):
                look_up()
    for cls in gc.get_objects():
        if isinstance(cls, type):
            # A name that no class has: no code of a class or a descriptor runs.
            with contextlib.suppress(AttributeError):
                type.__getattribute__(cls, " ")


def _name_of_module() -> str:
    return __name__


def fill_holes() -> int:
    """Take all free pieces of malloc's heap, for ever; how many bytes.

    What a forked process allocates would fill them, here and there, each in a page that is
    copied for it. So it lies together, at the end of the heap.
    """
    end = _libc.sbrk(0)
    taken_bytes = 0
    for size in _HOLES_BYTES:
        while 0 < (piece := _libc.malloc(size)) < end:
            taken_bytes += size
        _libc.free(piece)
    return taken_bytes


def fill_pools() -> int:
    """The same for the pools of Python's own allocator, for objects of each size."""
    taken_bytes = 0
    # None with another allocator, which has no such pools.
    most = sys.getallocatedblocks() // _PART_FREE
    for size in range(_SMALLEST_BYTES, _LARGEST_POOLED_BYTES + 1, _POOLED_STEP_BYTES):
        in_a_row, before = 0, 0
        for _ in range(most):
            # A pool that was filled from its begin to its end was empty; so is the next.
            if in_a_row >= _POOL_BYTES // size - 2:
                break
            piece = bytes(size - sys.getsizeof(b""))
            in_a_row = in_a_row + 1 if id(piece) == before + size else 0
            before = id(piece)
            _fillings.append(piece)
            taken_bytes += size
    return taken_bytes


def gather_code(names: Iterable[str]) -> int:
    """Lay the code of functions side by side, and the texts in it; how many were found.

    A call writes to the code's object: it counts its calls, and is rewritten for what it meets.
    It counts a reference to each constant that it loads, and to its name for a coroutine.
    Imports lay the code that each process runs among ten times as much that none ever does.

    Args:
        names: As `module:qualified.name`, which is the code's own.
    """
    wanted = frozenset(names)
    copies: dict[int, CodeType] = {}  # id of the original -> copy
    for function in gc.get_objects():
        if not isinstance(function, FunctionType):
            continue
        code = function.__code__
        if f"{function.__globals__.get('__name__')}:{code.co_qualname}" in wanted:
            if id(code) not in copies:
                copies[id(code)] = _copied(code)
                # What it leaves would be a hole, to be filled by what each process makes.
                _left.append(code)
            function.__code__ = copies[id(code)]
            function.__qualname__ = _interned(function.__qualname__)
    return len(copies)


def _copied(code: CodeType) -> CodeType:
    """The same code, with the code and the texts inside of it, as new objects."""
    return code.replace(
        co_consts=tuple(map(_copied_constant, code.co_consts)),
        co_qualname=_interned(code.co_qualname),
    )


def _copied_constant(constant: object) -> object:
    if isinstance(constant, CodeType):
        return _copied(constant)
    return _interned(constant) if isinstance(constant, str) else constant


def _interned(text: str) -> str:
    """The text that is interned: itself, another, or a new one."""
    return sys.intern(f"{text} "[:-1])


def give_back_zeros(thing: object) -> int:
    """Give back the pages of a new object that hold nothing but zeros; how many bytes.

    An object with a large buffer inside has all of it written to when it is made. A page that
    was given back reads as zeros, and is there again once something is written to it. Nobody
    else may use the object meanwhile.
    """
    page_bytes = mmap.PAGESIZE
    begin = -(-id(thing) // page_bytes) * page_bytes
    end = (id(thing) + type(thing).__basicsize__) // page_bytes * page_bytes
    zeros = bytes(page_bytes)
    # A call for each run of pages: one for each page would be a fiftieth of a process's start.
    given_bytes, run = 0, begin
    for address in range(begin, end + page_bytes, page_bytes):
        if address < end and ctypes.string_at(address, page_bytes) == zeros:
            continue
        if address > run:
            _libc.madvise(run, address - run, _MADV_DONTNEED)
            given_bytes += address - run
        run = address + page_bytes
    return given_bytes
