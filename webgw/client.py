"""One HTTP request to another host's gateway, on a connection of its own."""

import asyncio

import h11

from streamd.errors import StreamdError
from streamd.link import LinkLost
from streamd.wire import MAX_FRAME_BYTES

CONNECT_S = 2.0
READ_BYTES = 65536


class Unreachable(StreamdError):
    """Nobody was asked: nothing was sent."""


class Silent(Unreachable):
    """Not even a refusal came back."""


Reply = tuple[int, dict[str, str], bytes]


async def post(address: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
    """Send `body` and wait for the reply: status, headers by lower-case name, body.

    Args:
        address: `host:port`.

    Raises:
        Unreachable: There is no connection; `Silent` where nothing came back in `CONNECT_S`.
        LinkLost: It broke before the whole reply was here.
    """
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except TimeoutError as error:
        raise Silent(f"{address} cannot be reached: timed out") from error
    except (OSError, ValueError) as error:
        raise Unreachable(f"{address} cannot be reached: {error}") from error
    try:
        return await _exchange(reader, writer, address, path, body, headers)
    except (OSError, h11.RemoteProtocolError) as error:
        raise LinkLost(f"{address} went away: {error}") from error
    finally:
        writer.close()


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    address: str,
    path: str,
    body: bytes,
    headers: dict[str, str],
) -> Reply:
    connection = h11.Connection(h11.CLIENT)
    given = {"host": address, "content-length": str(len(body)), "connection": "close"}
    request = h11.Request(method="POST", target=path, headers=list((given | headers).items()))
    for event in (request, h11.Data(data=body), h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    told: dict[str, str] = {}
    parts: list[bytes] = []
    status = size_bytes = 0
    while True:
        match connection.next_event():
            case h11.NEED_DATA:
                connection.receive_data(await reader.read(READ_BYTES))
            case h11.Response() as start:
                status = start.status_code
                told = {name.decode(): value.decode("latin-1") for name, value in start.headers}
            case h11.Data() as part:
                parts.append(bytes(part.data))
                size_bytes += len(part.data)
                if size_bytes > MAX_FRAME_BYTES:
                    raise LinkLost(f"{address} sends more than {MAX_FRAME_BYTES} bytes")
            case h11.EndOfMessage():
                return status, told, b"".join(parts)
            case _:
                raise LinkLost(f"{address} went away before it answered")
