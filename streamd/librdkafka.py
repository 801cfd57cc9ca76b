"""Options by librdkafka's own names: how they are given, and which are streamd's (pure)."""

from collections.abc import Mapping
from typing import Any

import msgspec

from streamd.kinds import Kind, Refused
from streamd.secrets import MASKED, is_secret_name, mask

_BY_SETTING = {
    "bootstrap.servers": "broker",
    "metadata.broker.list": "broker",
    "client.id": "broker_client_id",
    "group.protocol": "broker_group_protocol",
    "session.timeout.ms": "broker_session_timeout",
    "transaction.timeout.ms": "broker_session_timeout",
    "heartbeat.interval.ms": "broker_heartbeat_interval",
    "max.poll.interval.ms": "broker_max_poll_interval",
    "auto.offset.reset": "consumer_auto_offset_reset",
    "isolation.level": "processing_guarantee",
}
_BY_STREAMD = {
    name: reason
    for reason, names in {
        "streamd names its members and their transactions itself, so that a replaced process "
        "has its partitions again": "group.id group.instance.id transactional.id",
        "streamd commits what is done by itself, with the tables": (
            "enable.auto.commit auto.commit.enable auto.commit.interval.ms"
            " enable.auto.offset.store"
        ),
        "the partitions of a group's topics must lie together": (
            "partition.assignment.strategy group.remote.assignor"
        ),
        "keys must be where the tables look for them": "partitioner",
        "another value could lose records or change their order": (
            "acks request.required.acks enable.idempotence max.in.flight"
            " max.in.flight.requests.per.connection message.timeout.ms delivery.timeout.ms"
            " retries message.send.max.retries enable.gapless.guarantee"
            " delivery.report.only.error message.max.bytes"
        ),
        "streamd reads by it": "enable.partition.eof",
    }.items()
    for name in names.split()
}


def why_not(name: str) -> str | None:
    """Why a user cannot give this option; None: it can be given."""
    if setting := _BY_SETTING.get(name):
        return f"the setting {setting} says it"
    if name.endswith("_cb"):
        return "it is a function, and streamd has its own"
    return _BY_STREAMD.get(name)


def masked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without their secret values."""
    return {
        name: MASKED if is_secret_name(str(name)) and value is not None else value
        for name, value in options.items()
    }


def pairs(text: str) -> dict[str, Any]:
    """What one text says: a JSON object, or `name=value` with commas between.

    >>> pairs("sasl.mechanism=PLAIN, sasl.username=ann")
    {'sasl.mechanism': 'PLAIN', 'sasl.username': 'ann'}

    Raises:
        ValueError: It is neither.
    """
    if text.lstrip().startswith("{"):
        try:
            return msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise ValueError(text) from error
    parts = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(name.strip() and equals for name, equals, _ in parts):
        raise ValueError(text)
    return {name.strip(): value.strip() for name, _, value in parts}


def shown_raw(value: object) -> str:
    """A value that was given and may be wrong, as text for people."""
    if isinstance(value, str):
        try:
            value = pairs(value) if value.strip() else value
        except ValueError:
            # Not one name can be told from a secret.
            return MASKED if "=" in value or "{" in value else repr(value)
        return repr(value) if isinstance(value, str) else show_options(value)
    if isinstance(value, Mapping):
        return repr(masked(value))
    return mask(repr(value))


def _parse(value: object) -> dict[str, str | int | float | bool]:
    if value is None:
        return {}
    if isinstance(value, str):
        value = pairs(value)
    if not isinstance(value, Mapping):
        raise TypeError(value)
    options: dict[str, str | int | float | bool] = {}
    for name, each in value.items():
        if not isinstance(name, str) or not isinstance(each, str | int | float):
            raise Refused(f"option {name!r} has no text, number or truth")
        if why := why_not(name):
            raise Refused(f"{name!r} cannot be given: {why}")
        if isinstance(each, int) and not -(2**63) <= each < 2**63:
            raise Refused(f"the number of {name!r} is too large")
        options[name] = each
    return options


def show_options(options: Mapping[str, Any]) -> str:
    """Options as text for people, without their secrets."""
    return ", ".join(f"{name}={value}" for name, value in masked(options).items())


OPTIONS = Kind(
    'a table of librdkafka\'s options such as {"sasl.mechanism" = "PLAIN"}',
    _parse,
    show=show_options,
    shown_raw=shown_raw,
)
