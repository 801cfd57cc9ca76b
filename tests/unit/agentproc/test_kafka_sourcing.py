"""Which topics patterns mean."""

from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka.sourcing import Sources, meant
from streamd.config import resolve
from streamd.wire import TopicInfo

PATTERN = "^app-.*|sport"
SETTINGS = resolve({"id": "app", "broker": "kafka://127.0.0.1:1"}, {}, None, {})


def make_broker() -> KafkaBroker:
    topics = [
        TopicInfo(PATTERN, 4, False, None, "", ""),
        TopicInfo("app-proj.count", 4, True, None, "", "", packed=True),
    ]
    return KafkaBroker(SETTINGS, topics, "one")


def test_a_pattern_means_whole_names_of_its_partitions_and_nothing_of_the_apps_own() -> None:
    own = [
        "app-counts-changes", "app-count-markers", "app-dead-letters", "app-leader",
        "app-reply-app#0", "app-proj.count", "__consumer_offsets",
    ]  # fmt: skip
    there = dict.fromkeys(["app-de", "app-markers-fr", "sport", "sports", *own], 4)

    found = meant(make_broker(), [PATTERN], {**there, "app-odd": 3})

    assert found.topics == ["app-de", "app-markers-fr", "sport"]
    assert list(found.misfits) == ["app-odd"]
    assert "it has 3 partitions" in found.misfits["app-odd"]


def test_each_agent_reads_what_it_names_and_what_its_pattern_means() -> None:
    agents = {"all": [PATTERN], "count": ["app-proj.count"], "both": ["app-de", PATTERN]}
    sources = Sources(make_broker(), "g", agents)
    topics = ["app-de", "app-proj.count", "sport"]

    assert sources.named == ["app-de", "app-proj.count"]
    assert sources.agents(topics) == {
        "all": ["app-de", "sport"], "count": ["app-proj.count"], "both": ["app-de", "sport"],
    }  # fmt: skip
    said = {PATTERN: "latest", "app-de": "error"}
    assert sources.resets(topics, said) == {**said, "sport": "latest"}
