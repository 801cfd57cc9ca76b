"""Tokens of OAUTHBEARER, from what the user gives: librdkafka asks on a thread of its own."""

import asyncio
import base64
import inspect
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable

import msgspec

from streamd.credentials import token_of

log = logging.getLogger(__name__)

UNKNOWN_S = 300.0  # how long a token is taken to hold that does not say it


class _Claims(msgspec.Struct):
    exp: float = 0.0
    sub: str = ""


def token_callback(provider: str) -> Callable[[str], tuple[str, float, str, dict[str, str]]]:
    """For librdkafka's `oauth_cb`: token, when it ends, whose it is, extensions.

    Args:
        provider: `module:name`; it gives a token, or a token and when it ends (unix seconds).

    Raises:
        ConfigError: It cannot be imported.
    """
    # The process `log` has not imported the app, and does not know its folder.
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    ask = token_of(provider)

    def give(_config: str) -> tuple[str, float, str, dict[str, str]]:
        try:
            found = ask()
            if inspect.isawaitable(found):
                found = asyncio.run(_awaited(found))
            token, ends_at = found if isinstance(found, tuple) else (found, 0.0)
            claims = _claims(token)
        except Exception as error:
            # librdkafka keeps only that there was one.
            log.warning("%s gave no token: %s: %s", provider, type(error).__name__, error)
            raise
        return token, ends_at or claims.exp or time.time() + UNKNOWN_S, claims.sub, {}

    return give


async def _awaited(found: Awaitable[object]) -> object:
    return await found


def _claims(token: str) -> _Claims:
    """What a JWT says of itself; nothing where the token is opaque."""
    parts = token.split(".")
    if len(parts) != 3:
        return _Claims()
    try:
        return msgspec.json.decode(
            base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)), type=_Claims
        )
    except (ValueError, msgspec.MsgspecError):
        return _Claims()
