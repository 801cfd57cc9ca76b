"""Every setting: its name, type, default and help, and where its value came from.

The class `Settings` is the one table. From it come the keyword of `App`, the key of
`streamd.toml` or of `[tool.streamd]` in pyproject.toml, the environment variable, the option of
the command line, the rows of `streamd config` and `docs/settings.md`. An option wins over the
environment, that over `App`, that over the file, that over the default.

What must hold before any code of the user's runs (`early`) cannot be set in `App`. An
environment variable that is empty counts as not set.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, overload

import msgspec

from streamd.credentials import CREDENTIALS, security
from streamd.errors import ConfigError
from streamd.kinds import (
    ANY,
    APP_ID,
    BOOL,
    BROKER,
    CODEC,
    COUNT,
    COUNT_FROM_1,
    DURATION,
    DURATION_ABOVE_0,
    FALSE_WORDS,
    LEVEL,
    NAMES,
    NICE,
    OCTAL,
    PATH,
    PORT,
    SIZE,
    TEXT,
    TIMEZONE,
    VARIABLES,
    Kind,
    Refused,
    choice,
    optional,
)
from streamd.librdkafka import OPTIONS
from streamd.secrets import MASKED, hide, mask, secrets_of
from streamd.wire import SettingInfo

PREFIX = "STREAMD_"

OTHER_VARIABLES = frozenset({
    "STREAMD_AGENT", "STREAMD_APP", "STREAMD_COLOR", "STREAMD_COMPLETE", "STREAMD_CONFIG",
    "STREAMD_FAILPOINT", "STREAMD_GUARDIAN", "STREAMD_INSTANCE", "STREAMD_JSON", "STREAMD_NAME",
    "STREAMD_NOTIFY_FD", "STREAMD_RUNTIME_DIR", "STREAMD_TEST", "STREAMD_TREE",
    "STREAMD_CGROUP", "STREAMD_LISTENERS",
})  # fmt: skip
"""Variables of streamd that are no settings."""

OTHER_KEYS = frozenset({"app", "name"})
"""Keys of the settings file that are read by the command line, for what -A and --name say."""

_NEEDLESS = "it has no effect here: remove it"
_LATER = "it has no effect yet"

NO_EFFECT = {
    name: reason
    for reason, names in {
        "an app is its own event loop here: remove it": "loop beacon",
        "the interval adapts by itself; its bound is checkpoint_interval": (
            "broker_commit_interval broker_commit_every"
        ),
        "tables are held in memory and stored by streamd itself: remove it": "store tabledir",
        "an event that waits long is limited by @app.agent(timeout=...)": (
            "broker_commit_livelock_soft_timeout stream_processing_timeout"
        ),
        _NEEDLESS: (
            "cython_optimizations broker_api_version consumer_api_version producer_api_version"
            " producer_threaded store_check_exists crash_app_on_aerospike_exception"
            " aerospike_retries_on_exception"
            " aerospike_sleep_seconds_between_retries_on_exception stream_ack_cancelled_tasks"
            " stream_ack_exceptions stream_publish_on_commit stream_recovery_delay"
            " stream_wait_empty recovery_consistency_check table_key_index_size"
            " topic_disable_leader id_format web"
            " web_in_thread web_application_options web_transport web_stats_enabled"
            " web_graph_enabled web_router_enabled web_tables_enabled web_metrics_enabled"
            " canonical_url worker_redirect_stdouts worker_redirect_stdouts_level"
            " ConsumerScheduler TableManager PartitionAssignor LeaderAssignor Router Worker"
            " HttpClient Serializers blocking_timeout agent_supervisor stream_buffer_maxsize"
            " reply_create_topic create_reply_topic reply_to reply_to_prefix"
        ),
        "there is one cluster for reading and writing: set broker": (
            "broker_consumer broker_producer"
        ),
        "how many events are taken at once adapts by itself": "broker_max_poll_records",
        "Kafka gives a rebalance as long as broker_max_poll_interval": (
            "broker_rebalance_timeout"
        ),
        "each process has a name of its own in its group; STREAMD_INSTANCE names the host": (
            "consumer_group_instance_id"
        ),
        "streamd always waits for all copies: with less, records are lost": "producer_acks",
        "keys are always spread as Java's clients do: the tables look for them there": (
            "producer_partitioner"
        ),
        "set producer_linger": "producer_linger_ms",
        "a record may have 1 MB, as streamd's topics say": "producer_max_request_size",
        'set "metadata.max.age.ms" in broker_options': (
            "consumer_metadata_max_age_ms producer_metadata_max_age_ms"
        ),
        'set "connections.max.idle.ms" in broker_options': (
            "consumer_connections_max_idle_ms producer_connections_max_idle_ms"
        ),
        _LATER: (
            "monitor config_source logging_config loghandlers reply_expires"
            " table_cleanup_interval"
            " cache web_cors_options Agent Event Schema Stream Table"
            " SetTable GlobalTable SetGlobalTable Topic Monitor"
        ),
    }.items()
    for name in names.split()
}
"""Settings of Faust's that are taken and change nothing, and what the warning says."""

REFUSED = {
    name: "streamd cannot do this yet, and must not run as if it did"
    for name in ("web_ssl_context",)
}

ALIASES = {
    "url": "broker",
    "default_partitions": "topic_partitions",
    "replication_factor": "topic_replication_factor",
    "commit_interval": "broker_commit_interval",
    "origin": "app_origin",
    "client_id": "broker_client_id",
    "ssl_context": "broker_credentials",
    "num_standby_replicas": "table_standby_replicas",
}
"""Other names of Faust's, and the name that is meant."""

T_co = TypeVar("T_co", covariant=True)


class Setting(Generic[T_co]):
    """A row of the table. On an instance of `Settings` its name is the value itself.

    Args:
        kind: How its values look.
        default: As a user would write it; None: no value, which only an optional kind takes.
        help: One sentence.
        option: Its option of the command line; None: it has none.
        short: The option's letter.
        secret: Never shown.
        early: Must hold before user code runs.
        app_only: Can be set in `App` alone.
    """

    name: str

    def __init__(
        self,
        kind: Kind[T_co],
        default: object,
        help: str,
        *,
        option: str | None = "",
        short: str | None = None,
        secret: bool = False,
        early: bool = False,
        app_only: bool = False,
    ) -> None:
        self.kind = kind
        self.default = default
        self.help = help
        self.option = option
        self.short = short
        self.secret = secret
        self.early = early
        self.app_only = app_only

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        if self.secret or self.app_only:
            self.option = None
        elif self.option == "":
            self.option = f"--{name.replace('_', '-')}"

    @overload
    def __get__(self, settings: None, owner: type) -> "Setting[T_co]": ...

    @overload
    def __get__(self, settings: "Settings", owner: type) -> T_co: ...

    def __get__(self, settings: "Settings | None", owner: type) -> Any:
        # Reached only where the instance's __dict__, which wins, has no value.
        if settings is None:
            return self
        raise AttributeError(f"{self.name} is known only once the app is imported")

    @property
    def is_table(self) -> bool:
        """Does its value have names of its own?"""
        return self.kind in (OPTIONS, CREDENTIALS)

    @property
    def variable(self) -> str | None:
        """The environment variable's name."""
        return None if self.app_only else PREFIX + self.name.upper()

    def shown(self, value: object) -> str:
        """`value` as text for people, masked where it is secret."""
        if value is None:
            return ""
        return MASKED if self.secret else mask(self.kind.show(value))


class Settings:
    """The settings of one app, as they came out. Made by `resolve` or `bootstrap`."""

    # The app.
    id = Setting(
        APP_ID,
        "app",
        "The app's name: prefix of its consumer groups and of the topics it owns; "
        "with `version` above 1, `-v` and the version are added.",
        app_only=True,
    )
    version = Setting(
        COUNT_FROM_1,
        1,
        "Version of the app; a new one reads all topics from their beginning into new tables.",
    )
    autodiscover = Setting(
        ANY,
        False,
        "Modules to import so that their agents are found: true for all of the app's "
        "package, a list of modules and packages, or a function that gives one.",
        app_only=True,
    )
    app_origin = Setting(
        optional(TEXT), None, "The package that `autodiscover=True` searches.", app_only=True
    )
    env_prefix = Setting(
        optional(TEXT),
        None,
        "A further prefix of environment variables, which win over those with STREAMD_.",
        app_only=True,
    )
    debug = Setting(
        BOOL,
        False,
        "Show whole tracebacks; warn of table values that are changed in place, not assigned.",
    )
    timezone = Setting(TIMEZONE, "UTC", "Time zone of cron jobs that name none.")

    # What is done to events.
    broker = Setting(
        BROKER, "embedded://", "Where topics are: the embedded log, memory (tests), or Kafka."
    )
    datadir = Setting(
        optional(PATH),
        None,
        "Folder of the embedded log and of the tables' stores; a relative one is in the "
        "working folder. [default: {id}-data]",
        short="-D",
    )
    processing_guarantee = Setting(
        choice("at_least_once", "exactly_once"),
        "at_least_once",
        "What Kafka topics get after a crash; the embedded log is always exactly once.",
    )
    checkpoint_interval = Setting(
        DURATION_ABOVE_0, "50ms", "Longest time between two checkpoints while events come."
    )
    checkpoint_events = Setting(COUNT_FROM_1, 10_000, "Most events between two checkpoints.")
    on_error = Setting(
        choice("retry", "stop", "skip"),
        "retry",
        "What becomes of an event whose agent raises: tried again and then put into the dead "
        "letters; or its process stopped; or the event passed over.",
    )
    retries = Setting(COUNT, 3, "How often an event is tried again.")
    retry_backoff = Setting(
        DURATION, "100ms", "Wait before the first new try; it doubles with each further one."
    )
    reply_timeout = Setting(DURATION_ABOVE_0, "30s", "How long `ask` waits for its reply.")
    key_serializer = Setting(CODEC, "raw", "Codec of keys where a topic names none.")
    value_serializer = Setting(CODEC, "json", "Codec of values where a topic names none.")

    # Topics.
    topic_partitions = Setting(COUNT_FROM_1, 8, "Partitions of the topics that streamd makes.")
    topic_replication_factor = Setting(
        COUNT_FROM_1, 1, "Copies of the topics that streamd makes on Kafka."
    )
    topic_retention = Setting(
        optional(DURATION, "forever"),
        "7d",
        "How long records are kept in named topics; topics of the app's own keep what its "
        "agents have not read.",
    )
    topic_allow_declare = Setting(
        BOOL,
        True,
        "Make topics that are missing on Kafka; else a start without one is refused.",
    )
    consumer_auto_offset_reset = Setting(
        choice("earliest", "latest", "error"),
        "earliest",
        "Where an agent begins in a named topic that it has never read; error: it is refused "
        "where there are events already.",
    )
    broker_session_timeout = Setting(
        DURATION_ABOVE_0,
        "10s",
        "How long Kafka waits for a silent member before others take over.",
    )

    broker_heartbeat_interval = Setting(
        optional(DURATION_ABOVE_0),
        None,
        "How often a member tells Kafka that it lives; none: a tenth of the session's "
        "time-out, 1s at most.",
        option=None,
    )
    broker_max_poll_interval = Setting(
        DURATION_ABOVE_0,
        "5m",
        "How long a member may take to give back partitions before Kafka goes on without it.",
        option=None,
    )
    broker_request_timeout = Setting(
        DURATION_ABOVE_0,
        "60s",
        "How long Kafka may take to answer before the connection is made anew.",
        option=None,
    )
    broker_client_id = Setting(
        optional(TEXT),
        None,
        "How Kafka's logs and quotas call the app's clients, none: by its id; members of "
        "groups have names of their own.",
        option=None,
    )
    broker_check_crcs = Setting(
        BOOL, False, "Compare the checksums of what is read from Kafka.", option=None
    )
    broker_credentials = Setting(
        CREDENTIALS,
        None,
        "TLS and login on Kafka: SASLCredentials, SSLCredentials or OAuthCredentials of "
        "streamd, or a table of their words.",
        option=None,
    )
    broker_options = Setting(
        OPTIONS,
        {},
        "Options of all Kafka clients by librdkafka's names; they win over other settings.",
        option=None,
    )
    broker_consumer_options = Setting(OPTIONS, {}, "The same of those that read.", option=None)
    broker_producer_options = Setting(OPTIONS, {}, "The same of those that write.", option=None)
    consumer_max_fetch_size = Setting(
        SIZE, "1MiB", "Most that is read from a partition of Kafka's at once.", option=None
    )
    producer_compression_type = Setting(
        choice("none", "gzip", "snappy", "lz4", "zstd"),
        "lz4",
        "How records are compressed on Kafka.",
        option=None,
    )
    producer_linger = Setting(
        DURATION, "5ms", "How long records may wait for others to be sent with.", option=None
    )
    producer_max_batch_size = Setting(
        SIZE, "1MB", "Most that is written to a partition of Kafka's at once.", option=None
    )
    producer_request_timeout = Setting(
        DURATION_ABOVE_0,
        "30s",
        "How long Kafka may take to make copies of records before they are sent anew.",
        option=None,
    )

    table_standby_replicas = Setting(
        COUNT,
        0,
        "On how many further hosts each partition of a table is followed on Kafka, so that "
        "they take over without reading its changelog.",
    )
    broker_group_protocol = Setting(
        choice("classic", "consumer"),
        "classic",
        "How Kafka shares partitions among processes: classic, in which a process that is "
        "replaced has its own again at once; or consumer, that of KIP-848, from Kafka 4.0 on.",
    )

    # Processes.
    grace = Setting(
        DURATION, "30s", "How long a warm stop may take; then what still runs is cancelled."
    )
    hang_limit = Setting(
        DURATION,
        "30s",
        "How long a process's loop may stand still before it is replaced (log and web: 3s at "
        "least); 0: for ever.",
    )
    start_limit = Setting(
        DURATION,
        "60s",
        "How long a process that starts may give no sign of life before it is replaced; the "
        "time of the import does not count; 0: for ever.",
    )
    strategy = Setting(
        choice("one_for_one", "one_for_all", "rest_for_one"),
        "one_for_one",
        "What is restarted when a process dies: it alone; or the processes of all groups; or "
        "its own and those of the groups that start after its own, which send to it.",
    )
    fatal_retry = Setting(
        DURATION,
        "5m",
        "How long after a process was given up (FATAL) it is tried once more; 0: never.",
    )
    strays = Setting(
        choice("keep", "kill"),
        "keep",
        "What becomes of what a process has started and left behind when it ends: kept until "
        "the instance stops; or asked to end, and killed after `grace`.",
    )
    max_memory = Setting(
        optional(SIZE),
        None,
        "Private memory of an agent process above which it is drained and replaced, one "
        "process at a time.",
    )
    memory_check = Setting(
        DURATION_ABOVE_0,
        "15s",
        "How often the private memory of a process is looked at, with jitter; a process is "
        "replaced only after four times as long.",
    )

    # Web.
    web_enabled = Setting(
        BOOL, True, "Serve pages and look-ups over HTTP.", option="--with-web/--without-web"
    )
    web_bind = Setting(TEXT, "127.0.0.1", "Address to listen on.", short="-b")
    web_port = Setting(PORT, 6066, "Port to listen on; 0 takes a free one.", short="-p")
    web_host = Setting(
        optional(TEXT),
        None,
        "Name by which other hosts reach this one; a request's Host header may have it. "
        "[default: host name]",
    )
    web_hosts = Setting(
        NAMES, [], "Further names that a request's Host header may have, besides this host's."
    )
    web_token = Setting(
        optional(TEXT), None, "Secret that actions on streamd's own pages need.", secret=True
    )
    web_token_file = Setting(
        optional(PATH), None, "File whose first line is `web_token`, where that is not set."
    )
    web_max_body = Setting(SIZE, "1MiB", "Largest body of a request; above it: status 413.")
    web_timeout = Setting(
        DURATION_ABOVE_0, "30s", "How long a page may take; above it: status 504."
    )
    web_access_log = Setting(BOOL, False, "Log each request that was answered.")

    # What must hold before user code.
    loglevel = Setting(LEVEL, "info", "Least level that is logged.", short="-l", early=True)
    logfile = Setting(
        optional(PATH), None, "Log to this file. [default: stderr]", short="-f", early=True
    )
    log_format = Setting(
        choice("auto", "text", "json"),
        "auto",
        "Look of log lines; auto: text on a terminal, else JSON.",
        early=True,
    )
    log_max_size = Setting(
        optional(SIZE),
        "64MiB",
        "Size above which the log file is exchanged for a new one: `log` becomes `log.1`, that "
        "`log.2`, and so on.",
        early=True,
    )
    log_max_age = Setting(
        optional(DURATION),
        None,
        "Age of a log file's first line above which it is exchanged for a new one.",
        early=True,
    )
    log_keep = Setting(COUNT, 5, "How many old log files are kept.", early=True)
    workdir = Setting(
        optional(PATH), None, "Change to this folder first.", short="-W", early=True
    )
    user = Setting(optional(TEXT), None, "User to run as, name or number.", early=True)
    group = Setting(optional(TEXT), None, "Unix group to run as, name or number.", early=True)
    umask = Setting(optional(OCTAL), None, "Mode bits that new files lack.", early=True)
    nofile = Setting(
        optional(COUNT_FROM_1), None, "Limit of open files for each process.", early=True
    )
    nproc = Setting(
        optional(COUNT_FROM_1), None, "Limit of processes and threads of the user.", early=True
    )
    core = Setting(
        optional(SIZE),
        None,
        "Largest core file of a process that crashes; 0: none.",
        early=True,
    )
    nice = Setting(
        optional(NICE), None, "How much all processes give way to others, 0 to 19.", early=True
    )
    env = Setting(
        VARIABLES, [], "Environment variables of all processes, as NAME=value.", early=True
    )

    table: ClassVar[dict[str, Setting[Any]]]

    def __init__(self, values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        self.__dict__.update(values)
        self._names = [name for name in self.table if name in values]
        self._origins = dict(origins)
        self.warnings: list[str] = []

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> "Settings":
        """Settings again from what `plain` gave, e.g. in a process without the app."""
        values = {
            name: entry.kind.parse(plain[name])
            for name, entry in cls.table.items()
            if name in plain
        }
        return cls(values, dict.fromkeys(values, "the app"))

    @property
    def name(self) -> str:
        """The app's id without its version."""
        return self.id if self.version == 1 else self.id.removesuffix(f"-v{self.version}")

    def origin(self, name: str) -> str:
        """Where the value of this setting came from, as text for people."""
        return self._origins[name]

    def shown(self) -> list[SettingInfo]:
        """Every setting in the table's order, as text, secrets masked."""
        return [
            SettingInfo(name, self.table[name].shown(self.__dict__[name]), self._origins[name])
            for name in self._names
        ]

    def plain(self) -> dict[str, Any]:
        """Every value as data that a frame carries, secrets too: durations in seconds as
        float, sizes in bytes as int, paths absolute."""
        return {name: self.table[name].kind.plain(self.__dict__[name]) for name in self._names}


Settings.table = {
    name: entry for name, entry in vars(Settings).items() if isinstance(entry, Setting)
}
SETTINGS: tuple[Setting[Any], ...] = tuple(Settings.table.values())
"""The rows of the table, in its order."""


def broker_kind(broker: str) -> str:
    """`embedded`, `memory` or `kafka`, of the setting `broker`."""
    return broker.partition("://")[0].removesuffix("+ssl")


def broker_servers(broker: str) -> list[str]:
    """The servers of a kafka:// broker as `host:port`, without user and password."""
    rest = broker.partition("://")[2]
    return [server.rpartition("@")[2] for server in rest.split(";") if server]


# Where values come from.


class Found(msgspec.Struct, frozen=True):
    """A value that was given for a setting, and where."""

    value: Any
    origin: str
    fix: str  # what the user would change


def resolve(
    app_keywords: Mapping[str, Any],
    environ: Mapping[str, str],
    file: Path | None,
    options: Mapping[str, str],
) -> Settings:
    """Every setting's value from the four sources, by precedence.

    What was taken but has no effect, and unknown variables of the environment, are in
    `Settings.warnings`.

    Args:
        app_keywords: What `App` was given, its id under `id`.
        options: Setting name → text, as the command line was given it.

    Raises:
        ConfigError: A value cannot be used, or a name is unknown. It tells of all of them.
    """
    return _Resolution(app_keywords, environ, file, options, early_only=False).settings()


def bootstrap(
    environ: Mapping[str, str], file: Path | None, options: Mapping[str, str]
) -> Settings:
    """Only the settings that must hold before user code; others raise AttributeError.

    Raises:
        ConfigError: A value cannot be used, or a name in the file or options is unknown.
    """
    return _Resolution({}, environ, file, options, early_only=True).settings()


class _Resolution:
    """One run of `resolve` or `bootstrap`."""

    def __init__(
        self,
        app_keywords: Mapping[str, Any],
        environ: Mapping[str, str],
        file: Path | None,
        options: Mapping[str, str],
        *,
        early_only: bool,
    ) -> None:
        self._early_only = early_only
        self._errors: list[ConfigError] = []
        self._warnings: list[str] = []
        self._found: dict[str, Found] = {}
        self._prefix = app_keywords.get("env_prefix")
        # Later sources win.
        self._take(_in_file(file))
        self._take(_in_app(app_keywords))
        self._take(self._in_environment(environ, PREFIX))
        if isinstance(self._prefix, str) and self._prefix:
            self._take(self._in_environment(environ, self._prefix))
        self._take(_in_options(options))

    def settings(self) -> Settings:
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for name, entry in Settings.table.items():
            if self._early_only and not entry.early:
                continue
            found = self._found.get(name, Found(entry.default, "default", ""))
            try:
                values[name] = entry.kind.parse(found.value)
            except (ValueError, TypeError) as error:
                self._errors.append(_wrong_value(entry, found, error))
            origins[name] = found.origin
        if self._errors:
            raise _one_error(self._errors)
        if not self._early_only:
            _derive(values, origins)
        settings = Settings(values, origins)
        hide(secrets_of(settings.plain()))
        settings.warnings = self._warnings
        return settings

    def _take(self, source: Iterable[tuple[str, Found]]) -> None:
        for given, found in source:
            name = ALIASES.get(given, given)
            entry = Settings.table.get(name)
            if name in REFUSED:
                self._refuse(f"{given} is set ({found.origin}): {REFUSED[name]}", found.fix)
            elif name in NO_EFFECT:
                self._warnings.append(f"{given} ({found.origin}): {NO_EFFECT[name]}")
            elif entry is None:
                self._refuse(
                    f"unknown setting {given!r} ({found.origin}){_did_you_mean(given)}",
                    f"{found.fix}; `streamd config` lists all settings",
                )
            elif entry.app_only and not found.origin.startswith("App("):
                self._refuse(
                    f"{name} can be set only in App(...), not in {found.origin}", found.fix
                )
            elif entry.early and found.origin.startswith("App("):
                self._refuse(
                    f"{name} cannot be set in App(...): it must hold before the import",
                    f"set {name} in streamd.toml, {entry.variable} or {entry.option}",
                )
            else:
                self._found[name] = found

    def _refuse(self, message: str, remedy: str) -> None:
        self._errors.append(ConfigError(message, remedy=remedy))

    def _in_environment(
        self, environ: Mapping[str, str], prefix: str
    ) -> Iterator[tuple[str, Found]]:
        for variable, text in sorted(environ.items()):
            if not variable.startswith(prefix) or not text or variable in OTHER_VARIABLES:
                continue
            name = variable.removeprefix(prefix).lower()
            if (
                ALIASES.get(name, name) in Settings.table
                or name in REFUSED
                or name in NO_EFFECT
            ):
                found = Found(text, f"environment {variable}", f"correct or unset {variable}")
                yield name, found
            elif prefix == PREFIX and not variable.startswith("STREAMD_TEST_"):
                # A variable may be another program's: no reason to refuse to start.
                hint = _did_you_mean(name, lambda close: PREFIX + close.upper())
                self._warnings.append(f"the environment has {variable}, no setting{hint}")


def _in_app(keywords: Mapping[str, Any]) -> Iterator[tuple[str, Found]]:
    for name, value in keywords.items():
        yield name, Found(value, f"App({name}=...)", f"correct {name} in App(...)")


def _in_options(options: Mapping[str, str]) -> Iterator[tuple[str, Found]]:
    for name, text in options.items():
        entry = Settings.table.get(name)
        option = (entry and entry.option) or f"--{name.replace('_', '-')}"
        if "/" in option:
            option = option.split("/")[text.lower() in FALSE_WORDS]
        yield name, Found(text, f"option {option}", f"correct {option}")


def _in_file(file: Path | None) -> Iterator[tuple[str, Found]]:
    if file is None:
        return
    text, table = _read(file)
    for name, value in _flat(table):
        if name not in OTHER_KEYS:
            origin = f"{file.name}:{_line_of(name, text)}"
            yield name, Found(value, origin, f"correct {name} in {file}")


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values; `[web] port = 1` is `web_port = 1`, and `-` is as good as `_`."""
    for key, value in table.items():
        name = f"{prefix}{key.replace('-', '_')}"
        entry = Settings.table.get(name)
        if isinstance(value, dict) and not (entry and entry.is_table):
            yield from _flat(value, f"{name}_")
        else:
            yield name, value


def _read(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            f"the settings file {file} cannot be read: {error.strerror}",
            remedy="give another with --config",
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"the settings file {file} is no TOML: {error}", remedy=f"correct {file}"
        ) from error
    if file.name == "pyproject.toml":
        table = table.get("tool", {}).get("streamd", {})
    return text, table


def _line_of(name: str, text: str) -> int:
    """The line that sets `name`, or 1 where it is written in a way that is not looked for."""
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            section = re.sub(r"^tool\.streamd\.?", "", header[1].strip())
            if re.sub(r"[.\s-]+", "_", section) == name:
                return number
            continue
        key = line.partition("=")[0].strip().strip("'\"")
        full = f"{section}.{key}" if section else key
        if re.sub(r"[.\s-]+", "_", full) == name:
            return number
    return 1


def find_file(workdir: Path) -> Path | None:
    """The settings file of a folder: streamd.toml, else a pyproject.toml that has
    `[tool.streamd]`, else None."""
    own = workdir / "streamd.toml"
    if own.exists():
        return own
    shared = workdir / "pyproject.toml"
    try:
        return (
            shared if "streamd" in tomllib.loads(shared.read_text()).get("tool", {}) else None
        )
    except (OSError, ValueError):
        return None


def file_value(file: Path | None, key: str) -> str | None:
    """What the settings file says for one of `OTHER_KEYS`, or None.

    Raises:
        ConfigError: The file cannot be read, or the value is no text.
    """
    value = None if file is None else _read(file)[1].get(key)
    if value is None or isinstance(value, str):
        return value
    raise ConfigError(
        f"{key} in {file} is {value!r}; a text is expected", remedy=f"correct {file}"
    )


def _derive(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Fill in what depends on other settings."""
    if values["datadir"] is None:
        # Not by version: a new version reads the same log from its beginning.
        values["datadir"] = Path(f"{values['id']}-data")
    if values["version"] > 1:
        values["id"] = f"{values['id']}-v{values['version']}"
    security(values["broker"], values["broker_credentials"], values["broker_options"])
    file = values["web_token_file"]
    if values["web_token"] is None and file is not None:
        what = f"web_token_file is {str(file)!r} ({origins['web_token_file']})"
        try:
            lines = file.read_text().split()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{what}, which cannot be read: {getattr(error, 'strerror', None) or error}",
                remedy="name a file that this user can read",
            ) from error
        if not lines:
            raise ConfigError(
                f"{what}, which is empty", remedy="write the token into its first line"
            )
        values["web_token"] = lines[0]
        origins["web_token"] = f"file {file}"


def _wrong_value(entry: Setting[Any], found: Found, error: Exception) -> ConfigError:
    seen = MASKED if entry.secret else entry.kind.shown_raw(found.value)
    what = f"{entry.name} is {seen} ({found.origin})"
    if isinstance(error, Refused):
        return ConfigError(
            f"{what}: {error}", seen=[f"expected {entry.kind.expected}"], remedy=found.fix
        )
    close = get_close_matches(str(found.value).lower(), entry.kind.choices, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return ConfigError(f"{what}; expected {entry.kind.expected}{hint}", remedy=found.fix)


def _one_error(errors: list[ConfigError]) -> ConfigError:
    first, *others = errors
    if not others:
        return first
    return ConfigError(
        str(first),
        seen=[*first.seen, *(f"and {other}" for other in others)],
        remedy=first.remedy,
    )


def _did_you_mean(name: str, spelled: Callable[[str], str] = repr) -> str:
    close = get_close_matches(name.lower(), Settings.table, 1)
    return f"; did you mean {spelled(close[0])}?" if close else ""


def settings_page() -> str:
    """The text of docs/settings.md."""
    rows = [
        "# Settings",
        "",
        "Made from `streamd/config.py` by `settings_page()`; a test compares them.",
        "",
        "An option wins over the environment, that over `App(...)`, that over `streamd.toml`",
        "(or `[tool.streamd]` in `pyproject.toml`), that over the default. `streamd config`",
        "shows each value and where it came from. Durations are `500ms`, `30s`, `5m`, `2h` or",
        "a number of seconds; sizes `64MiB`, `1MB` or a number of bytes; truths",
        "`1 true yes on`, `0 false no off`. A variable that is empty counts as not set.",
        "In the file, `web_port = 1` and `port = 1` below `[web]` are the same.",
        "",
        "*Early* settings must hold before the app is imported: `App(...)` cannot set them.",
    ]
    for name, entry in Settings.table.items():
        value = None if entry.default is None else entry.kind.parse(entry.default)
        default = "none" if value in (None, [], {}) else f"`{entry.kind.show(value)}`"
        option = f"{entry.short}, {entry.option}" if entry.short else entry.option
        ways = [
            "" if entry.early else f"`App({'' if name == 'id' else f'{name}='}...)`",
            f"`{entry.variable}`" if entry.variable else "",
            f"`{option}`" if option else "",
            "early" if entry.early else "",
            "secret" if entry.secret else "",
        ]
        rows += [
            "",
            f"## {name}",
            "",
            entry.help,
            "",
            f"- Value: {entry.kind.expected}. Default: {default}.",
            f"- {' · '.join(way for way in ways if way)}",
        ]
    return "\n".join(rows) + "\n"
