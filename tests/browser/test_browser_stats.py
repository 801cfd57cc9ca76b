"""The stats page in a real browser: it draws, asks nobody else, and refreshes itself."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "process"))

from web_fleet import fleet, sample_snapshot  # noqa: E402

CHROMIUM = shutil.which("chromium")


def browse(url: str, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run the browser without a window, with a profile of its own."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        return subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--user-data-dir={profile}", *options, url],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_the_stats_page_draws_without_complaints(tmp_path: Path, width: int) -> None:
    picture = tmp_path / "page.png"
    with fleet(snapshot=sample_snapshot()) as web:
        url = f"http://127.0.0.1:{web.port}/"
        seen = browse(url, f"--window-size={width},900", f"--screenshot={picture}")
        page = browse(url, "--dump-dom")

    assert picture.stat().st_size > 10_000, seen.stderr
    assert "1 of 4 count_words processes restarts" in page.stdout
    complaints = [line for line in page.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
