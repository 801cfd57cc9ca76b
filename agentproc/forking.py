"""A fork whose child belongs to the parent of the process that forks.

The zygote forks, the master owns: it sees the end of the child, and the child ends with it. A
double fork gives the child away too, but it costs a second copy of the page tables, a second
process that ends, and the wait for that. Linux has a flag for it, CLONE_PARENT, which `os.fork`
cannot pass on. So the system call is made here, between the calls that CPython has for those
who fork by themselves, with the thread's id kept up to date as glibc does it.

What is left out are handlers of `pthread_atfork`: they take and give back what other threads
might hold. A process that has other threads forks twice instead.
"""

import ctypes
import os
import platform
import signal
import threading

_CLONE_PARENT = 0x00008000
_CLONE_CHILD_CLEARTID = 0x00200000
_CLONE_CHILD_SETTID = 0x01000000
_PR_GET_TID_ADDRESS = 40

_SYS_CLONE = {"x86_64": 56}  # others have another number and another order of arguments

# Not CDLL: that would let go of the interpreter's lock, which the child would not have then.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def tid_address() -> int:
    """Where the C library keeps the id of the main thread; 0: it cannot be told."""
    address = ctypes.c_void_p()
    if _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(address), 0, 0, 0) != 0:
        return 0
    # Another library than glibc may have another thing there.
    is_id = address.value and ctypes.c_int.from_address(address.value).value == os.getpid()
    return address.value if is_id and address.value else 0


def is_possible() -> bool:
    """True if this process has one thread, on a system that is known here."""
    return (
        platform.machine() in _SYS_CLONE
        and len(os.listdir("/proc/self/task")) == 1
        and threading.current_thread() is threading.main_thread()
        and tid_address() != 0
    )


def fork_for_parent() -> int:
    """Like `os.fork`, but the child is a child of this process's parent. See `is_possible`.

    Raises:
        OSError: As `os.fork` does.
    """
    flags = _CLONE_PARENT | _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID | signal.SIGCHLD
    address = tid_address()
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _libc.syscall(
        ctypes.c_long(_SYS_CLONE["x86_64"]),
        ctypes.c_ulong(flags),
        ctypes.c_void_p(None),  # no stack of its own: a copy of this one
        ctypes.c_void_p(None),
        ctypes.c_void_p(address),
        ctypes.c_ulong(0),
    )
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    code = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(code, os.strerror(code))
    return int(pid)
