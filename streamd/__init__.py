"""Stream processing in Python, run by a supervised fleet of processes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from streamd.agents import Agent as Agent
    from streamd.app import App as App
    from streamd.codecs import Codec as Codec
    from streamd.credentials import OAuthCredentials as OAuthCredentials
    from streamd.credentials import SASLCredentials as SASLCredentials
    from streamd.credentials import SSLCredentials as SSLCredentials
    from streamd.errors import StreamdError as StreamdError
    from streamd.events import Event as Event
    from streamd.records import Record as Record
    from streamd.streams import Stream as Stream
    from streamd.tables import Table as Table
    from streamd.topics import Topic as Topic

__all__ = [
    "Agent", "App", "Codec", "Event", "OAuthCredentials", "Record", "SASLCredentials",
    "SSLCredentials", "Stream", "StreamdError", "Table", "Topic",
]  # fmt: skip

_HOMES = {
    "Agent": "agents",
    "App": "app",
    "Codec": "codecs",
    "Event": "events",
    "OAuthCredentials": "credentials",
    "Record": "records",
    "SASLCredentials": "credentials",
    "SSLCredentials": "credentials",
    "Stream": "streams",
    "StreamdError": "errors",
    "Table": "tables",
    "Topic": "topics",
}


def __getattr__(name: str) -> Any:
    # Names come when they are asked for: `streamd status` and `--help` import this package too,
    # and without what an app needs they take a third of the time.
    if name not in _HOMES:
        raise AttributeError(f"module 'streamd' has no attribute {name!r}")
    return getattr(import_module(f"streamd.{_HOMES[name]}"), name)
