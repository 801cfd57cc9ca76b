"""Records that somebody waits for: written at once, outside any checkpoint. Blocks."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from confluent_kafka import KafkaException, Producer

from streamd.agentproc.broker import Output
from streamd.agentproc.kafka.options import Options
from streamd.errors import BrokerError

TURN_S = 0.2
CONNECT_S = 0.05
FLUSH_S = 35.0  # a record that is not written after 30 s is given up


class Appender:
    """A producer of its own, made at its first use: most processes need none."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._producer: Producer | None = None

    def append(self, outputs: Sequence[Output]) -> list[list[int]]:
        """Append; the offset of each record of each output, once all are durable.

        Raises:
            BrokerError: At least one of them was not written.
        """
        if self._producer is None:
            self._producer = Producer(self._options)
            # Its number, which the cluster gives an idempotent producer, comes with its first
            # connection; told to send before, librdkafka asks for it half a second later.
            self._producer.poll(CONNECT_S)
        producer = self._producer
        offsets = [[-1] * len(output.values) for output in outputs]
        problems: list[str] = []
        for output, places in zip(outputs, offsets, strict=True):
            topic, partition = output.tp
            for index, value in enumerate(output.values):
                headers = output.headers[index] if output.headers is not None else []
                while True:
                    try:
                        producer.produce(
                            topic,
                            value,
                            output.keys[index],
                            partition,
                            timestamp=int(output.timestamps[index] * 1000),
                            headers=cast(Any, list(headers)),
                            on_delivery=_noting(places, index, problems),
                        )
                    except BufferError:
                        producer.poll(TURN_S)
                        continue
                    except KafkaException as error:
                        problems.append(f"{output.tp}: {error.args[0].str()}")
                    break
        left = producer.flush(FLUSH_S)
        if left or problems:
            why = problems[0] if problems else "the cluster does not answer"
            raise BrokerError(f"a record was not written: {why}")
        return offsets


def _noting(places: list[int], index: int, problems: list[str]) -> Callable[[Any, Any], None]:
    def note(error: Any, message: Any) -> None:
        if error is not None:
            problems.append(f"{message.topic()}[{message.partition()}]: {error.str()}")
        else:
            places[index] = message.offset()

    return note
