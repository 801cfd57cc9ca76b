import asyncio
import os
import subprocess
import sys

import uvloop

from streamd.agentproc.sharing import give_back_zeros


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
