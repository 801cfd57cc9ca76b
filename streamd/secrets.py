"""What must never be shown: passwords in URLs, values of secret settings, and what is hidden.

Every text that leaves a process for people goes through `mask`: log lines, errors, events,
settings. It knows secrets by their form, and those that `hide` was given by their value.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MASKED = "***"
LEAST_HIDDEN_CHARS = 6  # shorter ones would blank ordinary words

_URL = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"<>]*@[^\s'\"<>]*")
# One server of a URL. A number and a slash are a port and a path that holds an @.
_LOGIN = re.compile(r"(?P<user>(?:://|[;,])[^/:@;,]*):(?!//|\d{1,5}/)(?P<password>[^;,]+)@")
_NAMED = re.compile(
    r"(?i)(?P<name>\b(?:--)?(?:(?:streamd_)?web[._-]token|[\w.-]*(?:password|passwd|secret))"
    r"(?![\w-])['\"]?(?:\s*[=:]\s*(?!\.\.\.)|(?:(?<=--web-token)|(?<=--web_token))\s+(?=\S)))"
    r"(?:(?P<quote>['\"])[^'\"]+(?P=quote)|['\"]?[^\s'\",;&)]+)"
)
_PERCENT = re.compile(rb"%([0-9a-fA-F]{2})")
# A token as OAuth's servers sign them: three parts in base64.
_SIGNED = re.compile(r"\beyJ[\w-]{6,}\.[\w-]+\.[\w-]*")
_SECRET_NAME = re.compile(
    r"(?i)(?:password|passwd|secret|token|passphrase|jaas\.config|key\.pem|private\.key)$"
)
_HINTS = ("password", "passwd", "secret", "token")
_hidden: set[str] = set()


def hide(values: Iterable[str]) -> None:
    """Let `mask` blank these texts, wherever they occur; the values of secret settings."""
    _hidden.update(value for value in values if len(value) >= LEAST_HIDDEN_CHARS)


def is_secret_name(name: str) -> bool:
    """Does an option of this name hold a secret?"""
    return _SECRET_NAME.search(name) is not None


def secrets_of(settings: Mapping[str, Any]) -> Iterator[str]:
    """The secret texts in the values of settings, as they stand there and decoded."""
    for name, value in settings.items():
        if isinstance(value, str) and is_secret_name(name):
            yield value
        if isinstance(value, Mapping):
            yield from secrets_of(value)
        for text in value if isinstance(value, list) else [value]:
            for url in _URL.findall(text) if isinstance(text, str) else ():
                for login in _LOGIN.finditer(url):
                    yield login["password"]
                    yield decoded(login["password"])


def decoded(text: str) -> str:
    """A text of a URL without its percent signs."""
    # By hand: urllib is half a megabyte of the master's memory.
    data = _PERCENT.sub(lambda found: bytes.fromhex(found[1].decode()), text.encode())
    return data.decode(errors="replace")


def may_hold_secrets(text: str) -> bool:
    """False if `mask` would leave `text` as it is; a quick look at much text at once."""
    if ("@" in text and "://" in text) or "eyJ" in text:
        return True
    lower = text.lower()
    return any(hint in lower for hint in _HINTS) or any(value in text for value in _hidden)


def mask(text: str) -> str:
    """Blank the passwords of URLs, the values of secret settings, and what was given to `hide`.

    >>> mask("kafka://ann:pass@host:9092")
    'kafka://ann:***@host:9092'
    """
    if not may_hold_secrets(text):
        return text
    if "@" in text and "://" in text:
        text = _URL.sub(lambda url: _LOGIN.sub(rf"\g<user>:{MASKED}@", url[0]), text)
    text = _SIGNED.sub(MASKED, _NAMED.sub(_blank, text))
    for value in _hidden:
        text = text.replace(value, MASKED)
    return text


def _blank(found: re.Match[str]) -> str:
    quote = found["quote"] or ""
    if not quote and found[0][found.end("name") - found.start() :].startswith(("'", '"')):
        quote = found[0][found.end("name") - found.start()]
    return f"{found['name']}{quote}{MASKED}{found['quote'] or ''}"
