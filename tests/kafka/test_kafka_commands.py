"""The commands on an app on Kafka, with and without a running instance."""

import json
import sys
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from kafka_app import WORDS, Site, eventually, site
from kafka_clients import unique

import streamd
from streamd.agentproc.broker import TP
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka import topics
from streamd.agentproc.kafka.standings import Standings
from streamd.agentproc.kafka.trimming import Trimmer
from streamd.wire import GroupInfo, Hello


@pytest.fixture
def words(kafka: str) -> Iterator[Site]:
    """An app that counts words, not started."""
    with site(WORDS, unique("words"), kafka) as here:
        yield here


def declared(here: Site) -> tuple[KafkaBroker, Hello]:
    """The app of a site, imported here."""
    module = types.ModuleType("proj")
    sys.modules["proj"] = module
    try:
        exec((here.place / "proj.py").read_text(), module.__dict__)
        app: streamd.App = module.__dict__["app"]
        app.configure({}, None, {})
        hello = app.hello("proj:app", alone=False)
    finally:
        del sys.modules["proj"]
    return KafkaBroker(app.settings, hello.topics, "elsewhere", patience_s=30), hello


def behind(here: Site) -> dict[str, int]:
    """How far behind each agent is, in all partitions."""
    found: dict[str, int] = {}
    for row in here.ask("lag")["lag"]:
        found[row["label"]] = found.get(row["label"], 0) + row["behind"]
    return found


def test_lag_tells_records_that_were_not_read_with_and_without_an_instance(
    words: Site,
) -> None:
    words.do(["send", f"{words.id}-posts", "-"], "a b a\na\nb\n")

    before = behind(words)
    words.do("start")
    eventually(lambda: behind(words) == {"split": 0, "count": 0} and words.count_of("a") == 3)
    told = eventually(lambda: words.ask("status")["lag"])
    words.do("stop")
    words.do(["send", f"{words.id}-posts", "c"])

    assert before == {"split": 3, "count": 0}
    assert behind(words) == {"split": 1, "count": 0}
    assert [(row["group"], row["partition"]) for row in told] == [
        ("split", 0), ("split", 1), ("count", 0), ("count", 1),
    ]  # fmt: skip


def trimmed(here: Site, *further: GroupInfo) -> dict[str, int]:
    """Trim once; by topic, how many records are gone."""
    broker, hello = declared(here)
    standings = Standings(broker, [*hello.groups, *further])
    try:
        assert standings.look(30)
        Trimmer(broker, hello.topics, standings).trim()
    finally:
        standings.close()
    admin = AdminClient(broker.reach.admin)
    lows = topics.lows(
        admin, [TP(t.name, p) for t in hello.topics for p in range(t.partitions)]
    )
    return {topic.name: sum(at for tp, at in lows.items() if tp.topic == topic.name)
            for topic in hello.topics}  # fmt: skip


def test_what_all_readers_have_done_is_trimmed_and_nothing_else(words: Site) -> None:
    words.do("start")
    words.do(["send", f"{words.id}-posts", "-"], 3 * "a b c d e f\n")
    eventually(lambda: words.count_of("f") == 3)
    words.do("stop")
    own, posts = f"{words.id}-proj.count", f"{words.id}-posts"
    _, hello = declared(words)
    reader = next(group for group in hello.groups if group.name == "count")
    late = msgspec.structs.replace(reader, name="late", tables=[])

    kept = trimmed(words, late)
    gone = trimmed(words)
    words.do("start")
    words.do(["send", posts, "a b"])
    eventually(lambda: words.count_of("b") == 4)

    assert kept[own] == 0, "a group that has no marker has read nothing"
    assert gone[own] > 0
    assert gone[posts] == 0, "a named topic is kept by its retention"
    assert words.count_of("f") == 3


@pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])
def test_reset_rebuilds_a_table_from_the_beginning_and_counts_each_word_once(
    words: Site, guarantee: str
) -> None:
    words.environment["STREAMD_PROCESSING_GUARANTEE"] = guarantee
    words.do(["send", f"{words.id}-posts", "-"], 3 * "a b\n")
    words.do("start")
    eventually(lambda: words.count_of("a") == 3)
    words.do("stop")

    planned = words.ask("reset --dry-run")
    done = words.ask("reset --yes")
    words.do(["send", f"{words.id}-posts", "b"])
    words.do("start")
    eventually(lambda: words.count_of("b") == 4)

    own = f"{words.id}-proj.count"
    assert planned["from"] == done["from"] == {f"{own}[0]": 0, f"{own}[1]": 0}
    assert (planned["done"], done["done"]) == (False, True)
    assert words.count_of("a") == 3


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(words: Site) -> None:
    planned = words.ask("start --dry-run")

    broker, hello = declared(words)
    texts = [each["text"] for each in planned["findings"] if each["subject"] == "topic"]
    names = [text.split()[0] for text in texts]
    assert sorted(names) == sorted(
        f"{words.id}-{name}"
        for name in (
            "posts", "proj.count", "dead-letters", "counts-changes", "split-markers",
            "count-markers",
        )
    )  # fmt: skip
    assert all("would be made: partitions" in text for text in texts)
    assert topics.describe(broker.admin, names) == {}
    assert words.run("status").returncode == 3


def test_check_warns_of_what_differs_and_fails_where_the_app_cannot_run(words: Site) -> None:
    broker, _ = declared(words)
    posts, changes = f"{words.id}-posts", f"{words.id}-counts-changes"
    for name, count in ((posts, 3), (changes, 2)):
        new = NewTopic(name, count, 1, config={"cleanup.policy": "delete"})
        broker.admin.create_topics([new])[name].result(30)
    eventually(lambda: len(topics.describe(broker.admin, [posts, changes])) == 2)

    checked = words.run("check --json")

    found = {
        (each["level"], each["text"].split(":")[0]): each["text"]
        for each in json.loads(checked.stdout)["findings"]
        if each["subject"] == "topic" and each["level"] != "ok"
    }
    groups = f"consumer groups {words.id}.split, {words.id}.count"
    assert f"{groups}; an installation made at the first start" in checked.stdout
    assert checked.returncode == 1
    assert "cleanup.policy is delete, declared is compact" in found["warn", changes]
    assert any("has 3 partitions on the cluster" in text for text in found.values())


def test_without_a_cluster_commands_end_soon_with_69_and_one_sentence(words: Site) -> None:
    words.environment["STREAMD_BROKER"] = "kafka://127.0.0.1:1"
    words.write(WORDS.replace(', broker="BROKER"', ""), "")
    commands = ["lag", f"send {words.id}-posts a", f"consume {words.id}-posts", "reset --yes"]
    began_at = time.monotonic()

    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(words.run, [*commands, "check"]))

    took_s = time.monotonic() - began_at
    assert [each.returncode for each in ended] == [69] * 5
    sentence = "Error: the cluster at 127.0.0.1:1 cannot be reached"
    for each in ended[:4]:
        assert each.stderr.count("cannot be reached") == each.stderr.count(sentence) == 1
    assert took_s < 30, "about ten seconds, and twenty more for a busy machine"


def test_a_new_version_reads_all_topics_from_their_beginning_into_new_tables(
    words: Site, kafka: str
) -> None:
    words.do(["send", f"{words.id}-posts", "-"], 2 * "a b\n")
    words.do("start")
    eventually(lambda: words.count_of("a") == 2)
    words.do("stop")

    words.write(WORDS.replace('"ID", ', '"ID", version=2, ').replace("+= 1", "+= 10"), kafka)
    words.do("start")
    eventually(lambda: words.count_of("a") == 20)
    words.do("stop")
    words.write(WORDS, kafka)
    words.do(["send", f"{words.id}-posts", "a"])
    words.do("start")
    eventually(lambda: words.count_of("a") == 3)

    broker, _ = declared(words)
    made = [
        f"{words.id}-v2-{name}" for name in ("counts-changes", "split-markers", "proj.count")
    ]
    assert set(topics.describe(broker.admin, made)) == set(made)


def test_reset_is_refused_while_another_host_runs_the_app(words: Site, kafka: str) -> None:
    with site(WORDS, words.id, kafka) as elsewhere:
        elsewhere.do("start")
        refused = words.run("reset --yes")

    assert refused.returncode == 75
    assert "on every host" in refused.stderr
