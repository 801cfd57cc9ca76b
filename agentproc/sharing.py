"""What the processes that a zygote forks share of its memory, and keep sharing.

A forked process has the pages of the zygote until it writes to them; then it has a copy of its
own. It writes to a page by as little as a reference to one object in it, and to pages with free
room by what it makes. So what a process would write to is put out of its way before the fork.
"""

import ctypes
import gc
import mmap
import sys

_MADV_DONTNEED = 4
# From what glibc takes apart from its heap down to the smallest piece, in its own steps.
_HOLES_BYTES = (*(1 << power for power in range(16, 10, -1)), *range(1032, 23, -16))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.malloc.restype = _libc.sbrk.restype = ctypes.c_size_t
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_size_t]
_libc.sbrk.argtypes = [ctypes.c_ssize_t]
_libc.madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]


def prepare_for_forks() -> None:
    """Make ready what is there for the processes that are forked from now on.

    To be called once, with all imports done. Takes some ten milliseconds.
    """
    gc.collect()
    fill_holes()
    # An entry of this cache holds the name that it is for: each one that a process replaces
    # would have it write to the page of a name that it has nothing to do with.
    sys._clear_type_cache()
    # A collection in a forked process must not write to what was there before.
    gc.freeze()


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
    given_bytes = 0
    for address in range(begin, end, page_bytes):
        if ctypes.string_at(address, page_bytes) == zeros:
            _libc.madvise(address, page_bytes, _MADV_DONTNEED)
            given_bytes += page_bytes
    return given_bytes
