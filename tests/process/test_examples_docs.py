"""What README and quickstart show runs as they say."""

import re

import pytest
from examples_instance import ROOT, eventually, example


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_app_that_is_shown_counts_words(page: str) -> None:
    text = (ROOT / page).read_text()
    [source] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [words] = re.findall(r'streamd send -A proj posts "([^"]+)"', text)
    with example("proj") as proj:
        (proj.place / "proj.py").write_text(source)
        proj.run("check")
        proj.start("start", "--foreground")
        proj.run("send", "posts", words)

        right = words.split().count("the")
        eventually(lambda: proj.get("/count/the/") == (200, {"the": right}))

        assert "running" in proj.run("status")
        assert '"the"' in proj.run("table", "word_counts")
        assert proj.run("stop").startswith("Stopped proj")
        assert proj.process is not None and proj.process.wait(10) == 0
