"""The Procfile, run by honcho itself."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor_tree import ROOT, eventually

from streamd.instance import Folder
from streamd.supervisor import tree

APP = """
import asyncio
import streamd
app = streamd.App("proj")

@app.agent()
async def slow(stream):
    async for _ in stream:
        print("in work")
        await asyncio.sleep(1.0)
        print("done")

@app.task
async def feed():
    await slow.cast(1)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pf", dir="/tmp") as folder:
        yield Path(folder)


def test_honcho_starts_it_and_ctrl_c_stops_it_warm_with_nothing_left(place: Path) -> None:
    (place / "proj.py").write_text(APP)
    shutil.copy(ROOT / "Procfile", place)
    command = place / "bin" / "streamd"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m streamd "$@"\n')
    command.chmod(0o755)
    folder = Folder(place / "run" / "proj")
    output = place / "output.txt"
    with output.open("wb") as file:
        honcho = subprocess.Popen(
            [sys.executable, "-m", "honcho", "start"], cwd=place, stdout=file, stderr=file,
            env={
                **os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT), "STREAMD_RUNTIME_DIR": str(place / "run"),
                "STREAMD_WEB_PORT": "0",
            },
            start_new_session=True,
        )  # fmt: skip
    try:
        eventually(lambda: "in work" in output.read_text(), 30)
        record = folder.read_record()
        assert record is not None

        # Ctrl-C goes to every process of the terminal's foreground group.
        os.killpg(honcho.pid, signal.SIGINT)
        honcho.wait(30)
    finally:
        honcho.kill()
        tree.kill_tree("", folder.read_record(), folder.lock_path)

    said = output.read_text()
    assert "proj stopped warm" in said, said
    assert said.count("in work") == said.count("done") == 1
    assert "stream.1" in said
    assert tree.find_tree(record.tree, record, folder.lock_path) == []
