"""Which partition of a table a key belongs to: the one that the producer of its events chose.

The partition comes from the bytes of the key in the topic that feeds the table, not from the
bytes under which the table stores it. It does no I/O.
"""

from collections.abc import Callable
from typing import Any

from streamd.app import App
from streamd.codecs import Codec
from streamd.partition import fast_partition_for
from streamd.tables import Table


def place_of(app: App, table: Table) -> Callable[[Any], int]:
    """A function from a key to its partition."""
    codec, count, partition_for = (
        _route_codec(app, table),
        table.partitions or 1,
        fast_partition_for(),
    )

    own = table.key_codec

    def place(key: Any) -> int:
        try:
            data = codec.encode(key)
        except Exception:
            # A key that no event of the topic can have: a number, beside raw keys.
            try:
                data = own.encode(key)
            except Exception as error:
                raise own.encode_error(key, error) from error
        return partition_for(data, count)

    return place


def place_text(app: App, table: Table, text: str) -> int:
    """The partition of a key that stands in a URL or was typed.

    Raises:
        DecodeError: The text is no key of the topic's type.
    """
    codec = _route_codec(app, table)
    return fast_partition_for()(codec.encode(codec.from_text(text)), table.partitions or 1)


def _route_codec(app: App, table: Table) -> Codec:
    topic = app.route_topic(table)
    return topic.key_codec if topic is not None else table.key_codec
