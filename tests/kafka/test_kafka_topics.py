"""The topics of an app: made as they are declared, and held against what is there."""

from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from kafka_app import eventually
from kafka_clients import unique

import streamd
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka.making import Survey, make, survey
from streamd.agentproc.kafka.topics import configs_of, describe
from streamd.errors import AppError, ConfigError


class Declared:
    """An app that counts what is in one topic, and what the cluster is told of it."""

    def __init__(self, bootstrap: str, app: streamd.App) -> None:
        app.configure({}, None, {})
        self.hello = app.hello("proj:app", alone=False)
        self.broker = KafkaBroker(app.settings, self.hello.topics, "host", patience_s=30)
        self.admin = AdminClient({"bootstrap.servers": bootstrap})

    def make(self) -> Survey:
        return make(self.broker, self.hello.groups, self.hello.tables)

    def survey(self) -> Survey:
        return survey(self.broker, self.hello.groups, self.hello.tables)

    def config(self, name: str) -> dict[str, str]:
        return configs_of(self.admin, [name])[name]

    def make_by_hand(self, name: str, partitions: int, **config: str) -> None:
        new = NewTopic(name, partitions, 1, config=config)
        self.admin.create_topics([new], operation_timeout=30)[name].result(30)
        eventually(lambda: describe(self.admin, [name]))


@pytest.fixture
def counting(kafka: str) -> Callable[..., Declared]:
    def declare(settings: dict[str, Any] | None = None, **of_topic: Any) -> Declared:
        app = streamd.App(
            unique("app"), broker=f"kafka://{kafka}", topic_partitions=2, **settings or {}
        )
        words = app.topic(f"{app.given_id}-words", value_type=str, **of_topic)
        counts = app.Table("counts", default=int)

        @app.agent(words)
        async def count(words: Any) -> None:
            async for word in words:
                await again.send(key=word, value=word)
                counts[word] += 1

        @app.agent(value_type=str)
        async def again(words: Any) -> None:
            async for word in words:
                assert word

        return Declared(kafka, app)

    return declare


def test_all_topics_are_made_before_the_groups_start(counting: Callable[..., Declared]) -> None:
    declared = counting()

    made = declared.make()

    id = declared.hello.app_id
    names = [
        f"{id}-words",
        f"{id}-counts-changes",
        f"{id}-count-markers",
        f"{id}-again-markers",
    ]
    found = describe(declared.admin, [topic.name for topic in made.missing])
    assert set(names) < set(found)
    assert {found[name].partitions for name in names} == {2}
    assert declared.survey().missing == []
    assert declared.survey().different == {}


def test_a_survey_tells_what_would_be_made_and_makes_nothing(
    counting: Callable[..., Declared],
) -> None:
    declared = counting()

    found = declared.survey()

    assert len(found.missing) == 6
    assert describe(declared.admin, [topic.name for topic in found.missing]) == {}


def test_a_topic_gets_the_shape_that_it_is_declared_with(
    counting: Callable[..., Declared],
) -> None:
    declared = counting(
        partitions=3, retention=60.0, compacting=True, deleting=True,
        config={"segment.ms": 120_000, "preallocate": False},
    )  # fmt: skip

    declared.make()

    name = f"{declared.hello.app_id}-words"
    config = declared.config(name)
    assert describe(declared.admin, [name])[name].partitions == 3
    assert set(config["cleanup.policy"].split(",")) == {"compact", "delete"}
    assert (config["retention.ms"], config["segment.ms"]) == ("60000", "120000")


def test_what_an_agent_has_not_read_is_kept_however_old_it_is(
    counting: Callable[..., Declared],
) -> None:
    declared = counting()

    declared.make()

    [own] = [topic.name for topic in declared.hello.topics if topic.owned]
    assert declared.config(own)["retention.ms"] == "-1"


def test_differences_from_what_exists_are_told_by_name_and_value(
    counting: Callable[..., Declared],
) -> None:
    declared = counting(retention=60.0)
    id = declared.hello.app_id
    declared.make_by_hand(f"{id}-words", 2, **{"retention.ms": "5000"})
    declared.make_by_hand(f"{id}-counts-changes", 2, **{"cleanup.policy": "delete"})

    different = declared.make().different

    assert different[f"{id}-words"] == ["retention.ms is 5000, declared is 60000"]
    assert "cleanup.policy is delete, declared is compact" in different[f"{id}-counts-changes"]
    assert any(
        how.startswith("min.compaction.lag.ms is 0")
        for how in different[f"{id}-counts-changes"]
    )


def test_settings_that_the_app_does_not_name_may_be_others(
    counting: Callable[..., Declared],
) -> None:
    declared = counting()
    declared.make_by_hand(f"{declared.hello.app_id}-words", 2, **{"retention.ms": "5000"})

    assert declared.make().different == {}


def test_another_number_of_partitions_is_refused_with_both_numbers(
    counting: Callable[..., Declared],
) -> None:
    declared = counting(partitions=4)
    declared.make_by_hand(f"{declared.hello.app_id}-words", 3)

    with pytest.raises(ConfigError, match="has 3 partitions on the cluster, the app says 4"):
        declared.make()


def test_nothing_is_made_where_the_app_may_not_declare(
    counting: Callable[..., Declared],
) -> None:
    declared = counting({"topic_allow_declare": False})

    with pytest.raises(ConfigError, match="topic_allow_declare is off") as refused:
        declared.make()

    assert any("min.compaction.lag.ms 86400000" in line for line in refused.value.seen)
    names = [topic.name for topic in declared.survey().missing]
    assert describe(declared.admin, names) == {}


def test_packed_records_are_never_compacted() -> None:
    app = streamd.App("app")

    with pytest.raises(AppError, match="packed and compacting"):
        app.topic("words", packed=True, compacting=True)
