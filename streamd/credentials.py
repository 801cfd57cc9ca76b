"""Who an app is to its Kafka cluster: TLS and login, in Faust's words (pure, but for files).

`broker_credentials` takes one of the classes here, an `ssl.SSLContext`, or a table of the same
words. `security` makes librdkafka's options of it, the broker's URL, and `broker_options`.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from streamd.errors import ConfigError
from streamd.kinds import Kind, Refused
from streamd.librdkafka import pairs, shown_raw
from streamd.secrets import MASKED, decoded, is_secret_name

MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")


@dataclass(frozen=True, repr=False)
class Credentials:
    """TLS, or a login, or both.

    Attributes:
        mechanism: Of SASL; "": no login.
        oauth_cb: `module:name` of what gives tokens.
        tls: Is the connection encrypted?
        cafile: Certificates that are trusted, in PEM, or a folder of them; "": the system's.
        cadata: The same as text.
        certfile: The app's own certificate, `keyfile` its key, `key_password` that one's.
        check_certificate: False trusts anyone.
        check_hostname: False takes the certificate of another host.
    """

    mechanism: str = ""
    username: str = ""
    password: str = ""
    oauth_cb: str = ""
    tls: bool = False
    cafile: str = ""
    cadata: str = ""
    certfile: str = ""
    keyfile: str = ""
    key_password: str = ""
    check_certificate: bool = True
    check_hostname: bool = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_show(self)})"

    def options(self) -> dict[str, Any]:
        """The same by librdkafka's names, but for `security.protocol` and tokens."""
        found = {
            "sasl.mechanism": self.mechanism,
            "sasl.username": self.username,
            "sasl.password": self.password,
            "ssl.ca.location": self.cafile,
            "ssl.ca.pem": self.cadata,
            "ssl.certificate.location": self.certfile,
            "ssl.key.location": self.keyfile,
            "ssl.key.password": self.key_password,
        }
        options: dict[str, Any] = {name: text for name, text in found.items() if text}
        if not self.check_certificate:
            options["enable.ssl.certificate.verification"] = False
        if not self.check_hostname:
            options["ssl.endpoint.identification.algorithm"] = "none"
        return options


class SSLCredentials(Credentials):
    """TLS, with a certificate of the app's own or without.

    Args:
        context: Its trusted certificates and checks are taken; a key that it has loaded cannot
            be taken out of it: give `certfile` and `keyfile`.
        purpose: As in Faust; says nothing here.
    """

    def __init__(
        self,
        context: Any = None,
        *,
        purpose: Any = None,
        cafile: str | Path | None = None,
        capath: str | Path | None = None,
        cadata: str | None = None,
        certfile: str | Path | None = None,
        keyfile: str | Path | None = None,
        key_password: str | None = None,
    ) -> None:
        trusted = _of_context(context) if context is not None else {}
        given = {
            "cafile": str(cafile or capath or ""),
            "cadata": cadata or "",
            "certfile": str(certfile or ""),
            "keyfile": str(keyfile or ""),
            "key_password": key_password or "",
        }
        super().__init__(**{"tls": True, **trusted, **{k: v for k, v in given.items() if v}})


class SASLCredentials(Credentials):
    """A login with user and password, over TLS where `ssl_context` is given."""

    def __init__(
        self,
        *,
        username: str = "",
        password: str = "",
        ssl_context: Any = None,
        mechanism: str = "PLAIN",
    ) -> None:
        super().__init__(
            **{
                **_of_context(ssl_context),
                "mechanism": _mechanism(mechanism),
                "username": username,
                "password": password,
            }
        )


class OAuthCredentials(Credentials):
    """A login with tokens, over TLS where `ssl_context` is given.

    Args:
        oauth_cb: A function of a module, or a class with a method `token`, coroutine or not,
            which gives a token; or its name, `module:name`. Every process imports it.
    """

    def __init__(self, *, oauth_cb: Any, ssl_context: Any = None) -> None:
        super().__init__(
            **{
                **_of_context(ssl_context),
                "mechanism": "OAUTHBEARER",
                "oauth_cb": _name_of(oauth_cb),
            }
        )


def _of_context(context: Any) -> dict[str, Any]:
    """What an `ssl.SSLContext`, or SSLCredentials, say of TLS."""
    if context is None:
        return {}
    if isinstance(context, Credentials):
        words = ("cafile", "cadata", "certfile", "keyfile", "key_password",
                 "check_certificate", "check_hostname")  # fmt: skip
        return {"tls": True, **{word: getattr(context, word) for word in words}}
    ssl: Any = sys.modules.get("ssl")  # who has a context has imported it
    if ssl is None or not isinstance(context, ssl.SSLContext):
        raise TypeError(context)
    certificates = context.get_ca_certs(binary_form=True)
    return {
        "tls": True,
        "cadata": "".join(map(ssl.DER_cert_to_PEM_cert, certificates)),
        "check_certificate": context.verify_mode != ssl.CERT_NONE,
        "check_hostname": context.check_hostname,
    }


def _mechanism(value: object) -> str:
    # An enum of Faust's carries the word as its value.
    word = str(getattr(value, "value", value)).strip().upper().replace("_", "-")
    if word not in MECHANISMS:
        close = get_close_matches(word, MECHANISMS, 1)
        hint = f"; did you mean {close[0]}?" if close else f": one of {', '.join(MECHANISMS)}"
        raise Refused(f"no mechanism {str(value)!r} is known{hint}")
    return word


def _name_of(provider: object) -> str:
    if isinstance(provider, str):
        module, colon, name = provider.partition(":")
        if not (module and colon and name):
            raise Refused(f"oauth_cb is {provider!r}, not of the form module:name")
        return provider
    name = getattr(provider, "__qualname__", "<")
    if "<" in name or not isinstance(getattr(provider, "__module__", None), str):
        raise Refused(
            f"oauth_cb is {type(provider).__name__!r}, which no other process can import: give "
            "a function or class of a module, or 'module:name'"
        )
    return f"{provider.__module__}:{name}"


def _parse(value: object) -> Credentials | None:
    if value is None or isinstance(value, Credentials):
        return value
    if isinstance(value, str):
        if value.strip().lower() in {"", "none"}:
            return None
        value = pairs(value)
    if not isinstance(value, Mapping):
        return Credentials(**_of_context(value))
    known = {field.name for field in fields(Credentials)}
    words = dict(value)
    for word, each in words.items():
        if word not in known:
            close = get_close_matches(str(word), known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise Refused(f"{word!r} is nothing that credentials have{hint}")
        expected = bool if word in {"tls", "check_certificate", "check_hostname"} else str
        if expected is bool and str(each).lower() in {"true", "false"}:
            words[word] = str(each).lower() == "true"
        elif not isinstance(each, expected):
            raise Refused(f"{word!r} is no {'truth' if expected is bool else 'text'}")
    if words.get("oauth_cb"):
        words.setdefault("mechanism", "OAUTHBEARER")
        _name_of(words["oauth_cb"])
    elif words.get("username"):
        words.setdefault("mechanism", "PLAIN")
    if words.get("mechanism"):
        words["mechanism"] = _mechanism(words["mechanism"])
    words.setdefault("tls", any(words.get(word) for word in ("cafile", "cadata", "certfile")))
    return Credentials(**words)


def _words(credentials: Credentials | None) -> dict[str, Any] | None:
    if credentials is None:
        return None
    given = {field.name: getattr(credentials, field.name) for field in fields(Credentials)}
    for word in ("cafile", "certfile", "keyfile"):
        if given[word]:
            given[word] = str(Path(given[word]).expanduser().absolute())
    return given


def _show(credentials: Credentials | None) -> str:
    if credentials is None:
        return ""
    shown = []
    for field in fields(Credentials):
        value = getattr(credentials, field.name)
        if value != field.default:
            long = field.name == "cadata"
            secret = is_secret_name(field.name)
            shown.append(f"{field.name}={MASKED if secret else '...' if long else value}")
    return ", ".join(shown)


def _shown_raw(value: object) -> str:
    if isinstance(value, Mapping):
        # A name that is not known may be one of a secret, written wrong.
        known = {field.name for field in fields(Credentials)}
        value = {name: each if name in known else MASKED for name, each in value.items()}
    return shown_raw(value)


CREDENTIALS: Kind[Credentials | None] = Kind(
    "SASLCredentials, SSLCredentials, OAuthCredentials, an SSLContext, or a table of their "
    "words such as mechanism, username, password, cafile, certfile, keyfile",
    _parse,
    show=_show,
    plain=_words,
    shown_raw=_shown_raw,
)


def login_of(broker: str) -> tuple[str, str] | None:
    """User and password in a kafka:// URL, decoded; None where it names nobody.

    Raises:
        ConfigError: Its servers have different ones.
    """
    rest = broker.partition("://")[2]
    # A list may name them once, with its first server.
    logins = {user for server in rest.split(";") if (user := server.rpartition("@")[0])}
    if len(logins) > 1:
        raise ConfigError(
            f"broker is {broker!r}: its servers have different users or passwords",
            remedy="name one user, at the first server",
        )
    for login in logins:
        user, _, password = login.partition(":")
        return decoded(user), decoded(password)
    return None


def security(
    broker: str, credentials: Credentials | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """How the cluster is reached and who asks, by librdkafka's names, `options` among them.

    Raises:
        ConfigError: The user is named in two ways.
    """
    login = login_of(broker)
    own = credentials.options() if credentials is not None else {}
    named = {
        "the broker's URL": login,
        "broker_credentials": own.get("sasl.username"),
        "broker_options": options.get("sasl.username"),
    }
    places = [place for place, user in named.items() if user]
    if len(places) > 1:
        raise ConfigError(
            f"the user of the cluster is named twice: in {' and in '.join(places)}",
            remedy=f"leave it in {places[0]} alone",
        )
    found = {**own, **options}
    if login is not None:
        found |= {"sasl.username": login[0], "sasl.password": login[1]}
    mechanism = found.pop("sasl.mechanisms", None) or found.get("sasl.mechanism")
    if found.get("sasl.username") and not mechanism:
        mechanism = "PLAIN"
    if mechanism:
        found["sasl.mechanism"] = mechanism
    tls = (
        broker.startswith("kafka+ssl")
        or (credentials is not None and credentials.tls)
        or any(name.startswith("ssl.") for name in options)
    )
    if (mechanism or tls) and "security.protocol" not in found:
        found["security.protocol"] = (
            f"sasl_{'ssl' if tls else 'plaintext'}" if mechanism else "ssl"
        )
    return found


def token_of(provider: str) -> Callable[[], Any]:
    """What gives tokens, imported by its name `module:name`.

    Raises:
        ConfigError: There is no such thing.
    """
    module, _, name = provider.partition(":")
    try:
        found: Any = __import__(module, fromlist=["_"])
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"oauth_cb is {provider!r}, which cannot be imported: {error}",
            remedy="name a function or class of a module that every process can import",
        ) from error
    if isinstance(found, type):
        found = found()
    return cast("Callable[[], Any]", getattr(found, "token", found))
