"""When a checkpoint is made, by the settings; and the usual partitions and codecs of topics."""

import asyncio
from typing import Any

from flowing import app_of, flow_test, running

from streamd.app import App


def build(**settings: Any) -> App:
    app = app_of(**settings)
    words = app.topic("words", value_type=int)
    total = app.Table("total", default=int)

    @app.agent(words)
    async def add(stream: Any) -> None:
        async for number in stream:
            total["all"] += number
            await asyncio.sleep(0)

    return app


def checkpoints(**settings: Any) -> int:
    """How many checkpoints 2,000 events take."""
    counts: list[int] = []

    async def scenario() -> None:
        async with running(lambda: build(**settings)) as flow:
            await flow.append("words", [(None, b"1")] * 2_000)
            await flow.settled()
            assert flow.table("total") == {"all": 2_000}
            counts.append(flow.engine("add").statistics().checkpoints)

    flow_test(scenario)
    return counts[0]


def test_so_many_events_make_a_checkpoint_due() -> None:
    seldom = checkpoints(checkpoint_interval=30.0, checkpoint_events=10_000)
    often = checkpoints(checkpoint_interval=30.0, checkpoint_events=20)

    assert often > 2 * seldom


def test_so_much_time_makes_a_checkpoint_due() -> None:
    seldom = checkpoints(checkpoint_interval=30.0)
    often = checkpoints(checkpoint_interval=0.001)

    assert often > 2 * seldom


def test_topics_that_name_none_have_the_usual_partitions_and_codecs() -> None:
    app = App("t", topic_partitions=3, key_serializer="json", value_serializer="raw")
    usual, own = app.topic("usual"), app.topic("own", partitions=5, value_serializer="json")
    app.finalize()

    assert (usual.partition_count, own.partition_count) == (3, 5)
    assert (usual.key_codec.name, usual.value_codec.name) == ("json", "raw")
    assert own.value_codec.name == "json"
