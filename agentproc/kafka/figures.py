"""What librdkafka counts of itself: chosen figures of all clients of a process, added up.

Each client that has `options.COUNTING` tells all it knows, some kilobytes of JSON, each few
seconds, on the thread that polls it.
"""

import msgspec


class _Time(msgspec.Struct):
    avg: float = 0.0  # microseconds


class _Node(msgspec.Struct):
    rtt: _Time = msgspec.field(default_factory=_Time)
    tx: int = 0
    txerrs: int = 0
    rxerrs: int = 0
    req_timeouts: int = 0
    disconnects: int = 0


class _Client(msgspec.Struct):
    name: str
    txmsgs: int = 0
    txmsg_bytes: int = 0
    rxmsgs: int = 0
    rxmsg_bytes: int = 0
    msg_cnt: int = 0
    brokers: dict[str, _Node] = {}


_decode = msgspec.json.Decoder(_Client).decode


class Figures:
    """See the module; may be told by any thread."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}

    def take(self, text: str) -> None:
        """A client's newest statistics; librdkafka's callback."""
        client = _decode(text)
        self._clients[client.name] = client

    def sums(self) -> dict[str, float]:
        """Name → number, of all clients since they were made; empty before any has told.

        `round_trip_ms` is the slowest node's mean, `records_queued` what is not written yet.
        """
        clients = list(self._clients.values())
        if not clients:
            return {}
        nodes = [node for client in clients for node in client.brokers.values()]
        return {
            "records_read": sum(client.rxmsgs for client in clients),
            "bytes_read": sum(client.rxmsg_bytes for client in clients),
            "records_written": sum(client.txmsgs for client in clients),
            "bytes_written": sum(client.txmsg_bytes for client in clients),
            "records_queued": sum(client.msg_cnt for client in clients),
            "requests": sum(node.tx for node in nodes),
            "request_errors": sum(node.txerrs + node.rxerrs for node in nodes),
            "request_timeouts": sum(node.req_timeouts for node in nodes),
            "disconnects": sum(node.disconnects for node in nodes),
            "round_trip_ms": max((node.rtt.avg for node in nodes), default=0.0) / 1000,
        }
