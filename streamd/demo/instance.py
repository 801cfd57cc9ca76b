"""The demo's instance as seen from outside: its folder, its control socket, its table."""

import json
from collections import Counter
from typing import Any

from streamd.errors import TableError
from streamd.instance import Folder
from streamd.link import connect
from streamd.wire import Command, Document, Message, Scan, Scanned

ANSWER_S = 10.0
ROWS_A_SCAN = 10_000


async def _request(address: str, name: str, message: Message) -> Message:
    link = await connect(address, name)
    try:
        return await link.request(message, ANSWER_S)
    finally:
        link.close()


async def ask(folder: Folder, verb: str) -> Any:
    """What the master answers to a command.

    Raises:
        LinkLost: It does not listen, or ended before it answered.
        TimedOut: No answer in time.
    """
    answer = await _request(str(folder.control_path), folder.path.name, Command(verb))
    assert isinstance(answer, Document)
    return answer.data


async def read_counts(folder: Folder, table: str) -> Counter[str]:
    """Every key of the table with its committed value, asked of the processes that own it.

    Raises:
        TableError: A process does not own its part any more, or cannot answer yet.
        StreamdError: It cannot be asked.
    """
    counts: Counter[str] = Counter()
    told = await ask(folder, "status")
    [group] = [row["group"] for row in told["tables"] if row["name"] == table]
    for row in (await ask(folder, "owners"))["owners"]:
        if row["group"] == group:
            counts.update(await _read_part(row["address"], row["process"], table))
    return counts


async def _read_part(address: str, process: str, table: str) -> Counter[str]:
    answer = await _request(address, process, Scan(table, "", ROWS_A_SCAN))
    if not isinstance(answer, Scanned):
        raise TableError(f"{process} does not tell its part of {table}: {answer!r}")
    if answer.total > len(answer.rows):
        raise TableError(
            f"{process} holds {answer.total} keys of {table}; it tells {len(answer.rows)}"
        )
    return Counter({json.loads(key): int(value) for key, value in answer.rows})
