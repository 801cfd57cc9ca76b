"""The stats page in a real browser: it draws, asks nobody else, and refreshes itself."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "process"))

from browser_pipe import CHROMIUM, Tab, browser  # noqa: E402
from web_fleet import WebFleet, fleet, sample_snapshot  # noqa: E402

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

# Relative luminance and contrast as WCAG 2 defines them, of each text on what is behind it.
CONTRAST = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => v / 255).map(
      (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const poor = [];
  const texts = document.querySelectorAll("h1, h2, small, p, th, td, span, a, li, time");
  for (const element of texts) {
    if (element.closest("svg, [aria-hidden]") || !element.textContent.trim()) continue;
    const pair = [parse(getComputedStyle(element).color), ground(element)].map(luminance);
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 4.5) poor.push(`${element.textContent.trim().slice(0, 30)}: ${ratio}`);
  }
  return poor;
})()
"""


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def web() -> Iterator[WebFleet]:
    with fleet(snapshot=sample_snapshot()) as running:
        yield running


def text_of(tab: Tab, key: str) -> str:
    text = tab.evaluate(f"""document.querySelector('[data-k="{key}"]')?.textContent ?? "" """)
    return str(text).replace("\u202f", " ").replace("\u00a0", " ")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 700, 1000, 1600])
def test_the_page_fits_its_window_and_can_be_read(
    tab: Tab, web: WebFleet, width: int, dark: bool
) -> None:
    tab.open(f"http://127.0.0.1:{web.port}/", width=width, dark=dark)

    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(CONTRAST) == []
    assert tab.complaints == []


def test_the_page_asks_nobody_else(tab: Tab, web: WebFleet) -> None:
    tab.open(f"http://127.0.0.1:{web.port}/")

    assert all(url.startswith(f"http://127.0.0.1:{web.port}/") for url in tab.asked[-4:])
    assert any(url.endswith("/streamd/events") for url in tab.asked)


def test_numbers_change_in_place_and_rows_come_without_moving_the_focus(tab: Tab) -> None:
    snapshot = sample_snapshot()
    with fleet(snapshot=snapshot) as web:
        tab.open(f"http://127.0.0.1:{web.port}/")
        tab.until(lambda: text_of(tab, "rate") == "154 830")
        tab.evaluate("document.querySelector('.look input').focus()")
        tab.evaluate("window.kept = document.querySelector('[data-k=rate]')")

        snapshot["rate"] = 7.0
        web.show(snapshot)
        tab.until(lambda: text_of(tab, "rate") == "7.0")
        assert tab.evaluate("window.kept.isConnected && window.kept.textContent") == "7.0"

        snapshot["problems"] = []
        snapshot["processes"].append({**snapshot["processes"][-2], "name": "count_words#4"})
        web.show(snapshot)
        tab.until(lambda: text_of(tab, "p.count_words#4.state") == "running")
        assert tab.evaluate("document.querySelectorAll('.problems li').length") == 0
        assert tab.evaluate("document.activeElement.name") == "key"


def test_the_page_says_when_it_lost_its_server_and_comes_back(tab: Tab) -> None:
    with fleet(snapshot=sample_snapshot()) as web:
        tab.open(f"http://127.0.0.1:{web.port}/")
        live = "document.getElementById('live').textContent"
        tab.until(lambda: tab.evaluate(live) == "live")

        web.stop()
        tab.until(lambda: tab.evaluate(live) == "reconnecting")
        tab.complaints.clear()
    assert tab.evaluate("document.querySelectorAll('.processes tbody tr').length") == 11


def test_a_key_is_looked_up_by_its_form(tab: Tab, web: WebFleet) -> None:
    web.owner_of("the").counts["the"] = 42
    tab.open(f"http://127.0.0.1:{web.port}/")

    tab.evaluate("document.querySelector('.look input').value = 'the'")
    tab.evaluate("document.querySelector('.look button').click()")

    tab.until(lambda: tab.evaluate("document.querySelector('pre')?.textContent") == "42")
    assert tab.complaints == []
