"""Open pages: each gets the newest snapshot, none may hold memory or the end back."""

import asyncio
from collections.abc import AsyncIterator

KEEP_ALIVE_S = 15.0


class Mailbox:
    """Holds the newest item only: a slow reader skips what it missed."""

    def __init__(self) -> None:
        self.task = asyncio.current_task()
        self._item = b""
        self._closed = False
        self._ready = asyncio.Event()

    def put(self, item: bytes) -> None:
        self._item = item
        self._ready.set()

    def close(self) -> None:
        self._closed = True
        self._ready.set()

    async def get(self) -> bytes | None:
        """The newest item since the last call; None once it is closed."""
        await self._ready.wait()
        self._ready.clear()
        return None if self._closed else self._item


class Hub:
    """All streams of this process."""

    def __init__(self) -> None:
        self._boxes: set[Mailbox] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._boxes)

    def publish(self, item: bytes) -> None:
        """Give each stream these bytes, made once for all of them."""
        for box in self._boxes:
            box.put(item)

    async def stream(self, head: bytes) -> AsyncIterator[bytes]:
        """`head`, then what is published, until the hub is closed."""
        if self._closed:
            return
        box = Mailbox()
        self._boxes.add(box)
        try:
            yield head
            while True:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        item = await box.get()
                except TimeoutError:
                    item = b": keep-alive\n\n"
                if item is None:
                    return
                yield item
        finally:
            self._boxes.discard(box)

    async def close(self, grace_s: float = 0.3) -> None:
        """End all streams; those whose client does not read are cancelled after `grace_s`."""
        self._closed = True
        for box in self._boxes:
            box.close()
        if self._boxes:
            await asyncio.sleep(grace_s)
        for box in list(self._boxes):
            if box.task is not None:
                box.task.cancel()
