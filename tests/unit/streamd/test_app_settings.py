"""Settings and keywords that say what an app is: each has an effect, or is refused or told."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamd import App
from streamd.errors import AppError
from streamd.webgw.options import WebOptions, may_be_called


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "shop_site"
    (folder / "inner").mkdir(parents=True)
    for name in (
        "__init__",
        "orders",
        "inner/__init__",
        "inner/users",
        "test_orders",
        "__main__",
    ):
        (folder / f"{name}.py").write_text(
            "import shop_seen\nshop_seen.names.append(__name__)\n"
        )
    (tmp_path / "shop_seen.py").write_text("names = []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "shop_site"
    for name in [name for name in sys.modules if name.startswith("shop_")]:
        del sys.modules[name]


def imported() -> list[str]:
    seen = sys.modules.get("shop_seen")
    return list(seen.names) if seen is not None else []


def finalized(**settings: Any) -> App:
    app = App("proj", **settings)
    app.finalize()
    return app


def test_autodiscover_imports_every_module_of_the_package_but_tests(package: str) -> None:
    finalized(autodiscover=True, app_origin=package)

    assert imported() == ["shop_site", "shop_site.inner", "shop_site.inner.users",
                          "shop_site.orders"]  # fmt: skip


@pytest.mark.parametrize("wanted", [["shop_site.orders"], lambda: ["shop_site.orders"]])
def test_autodiscover_takes_names_and_what_a_function_says(package: str, wanted: Any) -> None:
    finalized(autodiscover=wanted)

    assert imported() == ["shop_site", "shop_site.orders"]


def test_nothing_is_discovered_unasked_and_what_is_not_there_is_named(package: str) -> None:
    finalized()
    assert imported() == []

    with pytest.raises(AppError, match=r"autodiscover names 'shop_site.gone', and there is no"):
        finalized(autodiscover=["shop_site.gone"])


def test_a_cron_job_without_a_zone_goes_by_the_setting() -> None:
    app = App("proj", timezone="Europe/Vienna")

    @app.crontab("30 2 * * *")
    async def by_setting() -> None: ...

    @app.crontab("30 2 * * *", tz="UTC")
    async def by_itself() -> None: ...

    app.finalize()

    zones = {timer.name: timer.cron.zone for timer in app.timers if timer.cron is not None}
    assert zones == {"by_setting": "Europe/Vienna", "by_itself": "UTC"}
    assert app.hello("", alone=False).timers[0].zone == "Europe/Vienna"


def test_a_keyword_without_effect_is_told() -> None:
    app = App("proj")
    app.task(colour=1)
    app.timer(1.0, max_drift_correction=0.1)
    app.page("/x", cors_options={})
    app.topic("t", acks=True)

    for text in ("task(colour=…)", "timer(max_drift_", "page(cors_", "topic(acks"):
        assert any(warning.startswith(text) for warning in app.warnings), app.warnings


def test_an_agent_that_is_given_a_topic_cannot_say_how_it_would_be() -> None:
    app = App("proj")
    words = app.topic("words")

    with pytest.raises(AppError, match=r"is given topic 'words' and value_type=, which says"):

        @app.agent(words, value_type=str)
        async def count(stream: Any) -> None: ...


def test_a_topic_that_is_declared_twice_is_the_same_or_refused() -> None:
    app = App("proj")
    words = app.topic("words", value_type=str, partitions=4)

    assert app.topic("words") is words
    assert app.topic("words", partitions=4) is words
    others: dict[str, Any] = {"partitions": 8, "value_type": int, "retention": 60.0}
    for keyword in others:
        with pytest.raises(AppError, match=f"topic 'words' is declared with {keyword} "):
            app.topic("words", **{keyword: others[keyword]})


def test_where_agents_begin_is_said_by_topic_or_setting_and_own_topics_from_the_start() -> None:
    app = App("proj", consumer_auto_offset_reset="latest")

    @app.agent()
    async def count(words: Any) -> None: ...

    assert app.topic("news").begins_at == "latest"
    assert app.topic("posts", offset_reset="error").begins_at == "error"
    assert count.channel.begins_at == "earliest"
    with pytest.raises(AppError, match="expected earliest, latest or error"):
        app.topic("words", offset_reset="beginning")


def test_topics_by_pattern_are_for_kafka_and_refused_elsewhere_with_what_to_do() -> None:
    for broker in ("embedded://", "memory://"):
        app = App("proj", broker=broker)
        app.topic(pattern="news-.*")
        with pytest.raises(AppError, match="is read on Kafka only") as refused:
            app.refuse_patterns()
        assert "name the topics" in (refused.value.remedy or "")
    app = App("proj", broker="kafka://host")
    app.topic(pattern="news-.*")
    app.refuse_patterns()


@pytest.mark.parametrize(
    ("names", "keywords", "text"),
    [
        (["news"], {}, "the name 'news' and the pattern"),
        ([], {"retention": 60}, "read as they are, and never made"),
        ([], {"pattern": "news-("}, "is no pattern"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(
    names: list[str], keywords: dict[str, Any], text: str
) -> None:
    with pytest.raises(AppError, match=text):
        App("proj").topic(*names, **{"pattern": "news-.*", **keywords})


def test_what_is_named_by_a_pattern_is_not_sent_to() -> None:
    topic = App("proj", broker="kafka://host").topic(pattern="news-.*", key_type=str)

    for key in (None, "k"):
        with pytest.raises(AppError, match="are read, not sent to"):
            asyncio.run(topic.send(key=key, value=1))


def test_web_host_is_a_name_that_a_request_may_have() -> None:
    options = WebOptions.of({"web_bind": "0.0.0.0", "web_host": "Stream.example.org"})

    assert may_be_called("stream.example.org:6066", options)
    assert not may_be_called("other.example.org:6066", options)
