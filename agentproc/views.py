"""Requests to an agent process: pages on its loop, questions about tables.

A page runs between two events, in the scope of its group, so it reads what was written up to
now; what it writes is made durable before it is answered. A request for a key that another
process has gets `Moved`, one that comes too early `Unavailable`: the gateway asks again.
"""

import asyncio
from collections.abc import Mapping
from typing import cast

from streamd import web
from streamd.agentproc.engine import Engine
from streamd.agentproc.pending import RolledBack
from streamd.agentproc.reads import RETRY_AFTER_S, CommittedTables
from streamd.app import App, Page
from streamd.link import Answer, Link
from streamd.wire import Message, Moved, PageReply, PageRequest, Unavailable


class _Failed(Exception):
    """The view answered that it failed: nothing that it wrote is kept."""

    def __init__(self, reply: PageReply) -> None:
        super().__init__(reply.status)
        self.reply = reply


class Answers:
    """The handler of the process's socket."""

    def __init__(
        self,
        app: App,
        engines: Mapping[str, Engine],
        generations: Mapping[str, int | None],
        tables: CommittedTables,
    ) -> None:
        self._app = app
        self._pages = {page.id: page for page in app.pages}
        self._engines = engines  # by group
        self._generations = generations  # by group; None while it recovers
        self._tables = tables
        self._in_work: list[str] = []  # the paths of the pages being answered
        self._none_in_work = asyncio.Event()
        self._none_in_work.set()
        self._stopping = False

    @property
    def busy_with(self) -> list[str]:
        """The pages that are being answered."""
        return [f"page {path}" for path in self._in_work]

    async def stop(self) -> None:
        """Run no page any more, and wait for those that run: they need their engine."""
        self._stopping = True
        await self._none_in_work.wait()

    async def take(self, link: Link, message: Message) -> Answer:
        """Answer a page's request or a question about a table."""
        if isinstance(message, PageRequest):
            return await self._page(message)
        return self._tables.answer(message)

    async def _page(self, request: PageRequest) -> Message:
        page = self._pages.get(request.route)
        engine = self._engines.get(page.group) if page is not None else None
        if page is None or engine is None:
            return Moved(0)  # before or after a reload the page is elsewhere, or is none
        generation = self._generations[page.group]
        if generation is None or self._stopping:
            return Unavailable("stopping" if self._stopping else "recovering", RETRY_AFTER_S)
        if request.partition >= 0 and not engine.session.is_sure():
            return Unavailable("it is not known whether it still has it", RETRY_AFTER_S)
        if request.partition >= 0 and not self._holds(page, request.partition):
            return Moved(generation)
        self._in_work.append(request.path)
        self._none_in_work.clear()
        try:
            return await self._run(engine, page, request)
        finally:
            self._in_work.remove(request.path)
            if not self._in_work:
                self._none_in_work.set()

    async def _run(self, engine: Engine, page: Page, request: PageRequest) -> Message:
        async def view() -> PageReply:
            reply = await web.answer(page.view, self._app, request)
            if reply.status >= 500:
                raise _Failed(reply)
            return reply

        try:
            return cast(PageReply, await engine.perform(f"page {page.path}", view()))
        except _Failed as failed:
            return failed.reply
        except RolledBack:
            return Unavailable("what the page wrote was taken back", RETRY_AFTER_S)

    def _holds(self, page: Page, partition: int) -> bool:
        return page.table is None or partition in page.table.held_partitions()
