"""The frames that processes of one instance exchange, and their bytes.

A frame is a 4-byte big-endian length and that many bytes of msgpack: `[id, message]`.
`id` is 0 for a message that wants no reply; a request has an id of 1 or more, unique among
the sender's requests; its replies carry the same id negated. A request is answered by one
message, or, where its comment says "stream", by any number of them and an `End`.
`Refusal` answers any request that cannot be done.

Every message is a tagged array, so fields may only be added at the end, with a default.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from streamd.errors import WireError

MAX_FRAME_BYTES = 16 * 1024 * 1024


class Message(msgspec.Struct, tag=True, array_like=True):
    """What a frame carries."""


# Answers that any request may get.


class Done(Message):
    """The request was carried out."""


class End(Message):
    """The last answer of a stream."""


class Refusal(Message):
    """The request cannot be done; mirrors `streamd.errors.StreamdError`."""

    message: str
    seen: list[str] = []
    remedy: str | None = None
    exit_code: int = 1


# What an app is, as the zygote tells it after the import.


class TopicInfo(Message):
    """A topic that the app names or owns."""

    name: str
    partitions: int
    owned: bool  # the app's own: an agent's topic, replies, dead letters
    retention_s: float | None  # of its own
    key_type: str
    value_type: str
    key_codec: str = ""
    value_codec: str = ""
    packed: bool = False  # on Kafka, several events travel as one record
    replicas: int = 0  # on Kafka; 0: as the settings say
    compacting: bool = False  # on Kafka, the last record of each key is kept
    deleting: bool | None = None  # on Kafka, old records go; None: unless it is compacting
    config: dict[str, str] = {}  # on Kafka, further settings of the topic


class AgentInfo(Message):
    """An agent; `name` is Faust's (module and function), `label` the short one."""

    name: str
    label: str
    topics: list[str]
    concurrency: int
    on_error: str
    help: str
    sends: list[str] = []  # topics that its function names, so may send to
    tables: list[str] = []  # tables that its function names, its group's or another's


class TableInfo(Message):
    """A table, and how a key of a URL becomes a partition.

    `route_codec` and `route_type` are the key codec and key type of the topic whose events
    write the table: the partition of a key is the one that its producer would choose.
    """

    name: str
    group: str
    partitions: int
    help: str
    route_codec: str
    route_type: str
    key_type: str
    value_type: str
    key_codec: str = ""
    value_codec: str = ""


class TimerInfo(Message):
    """A task, timer or cron job; `schedule` is text for people."""

    name: str
    kind: str  # "task" | "timer" | "crontab"
    group: str
    schedule: str
    zone: str
    on_leader: bool


class RouteInfo(Message):
    """A page. Its requests go to a process of `group`; with `table`, to the key's owner."""

    id: int
    path: str  # "/count/{word}/"
    methods: list[str]
    name: str
    group: str
    table: str | None
    match_info: str | None
    query_param: str | None
    help: str


class ModelInfo(Message):
    """A Record type: field name, type, default (None: required)."""

    name: str
    fields: list[tuple[str, str, str | None]]
    help: str


class GroupInfo(Message):
    """Agents that run together, and what else runs with them."""

    name: str
    agents: list[AgentInfo]
    tables: list[str]
    processes: int
    why: str  # one line: why these belong together
    auto: bool = False  # their number follows how far it is behind; `processes` is the least
    restart: str = "permanent"  # "permanent" | "transient" | "temporary"
    max_memory_bytes: int = 0  # private memory of a process; 0: what the settings say
    nice: int = 0  # added to what the instance has


class SettingInfo(Message):
    """A setting as it came out: value as text (masked where secret) and its origin."""

    name: str
    value: str
    origin: str


class Hello(Message):
    """The zygote's first message: the app was imported, this is what it is."""

    app_id: str
    origin: str  # "proj:app (proj/__init__.py)"
    groups: list[GroupInfo]  # in order of the data flow, sources first; "app" is last
    topics: list[TopicInfo]
    tables: list[TableInfo]
    timers: list[TimerInfo]
    routes: list[RouteInfo]
    models: list[ModelInfo]
    settings: dict[str, Any]  # every setting's value, as plain data
    settings_shown: list[SettingInfo]
    warnings: list[str]


class ImportFailed(Message):
    """The zygote's first message when there is no app to run."""

    message: str
    seen: list[str]
    remedy: str | None
    traceback: str  # user frames only; "" when the sentence says it all
    exit_code: int


# Master and zygote.


class Import(Message):
    """Master → zygote, first of all: import this app → `Hello` | `ImportFailed`.

    `options` are the settings given on the command line, by setting name, as text.
    """

    app: str  # what -A said: "proj", "proj.mod:attr", "path/file.py:attr"
    options: dict[str, str]
    config_file: str | None
    alone: bool  # `worker`: all groups in one process


class GroupPlan(Message):
    """This process is slot `slot` of the `slots` processes of `group`."""

    group: str
    slot: int
    slots: int


class Suspect(Message):
    """An event that was being worked on when its process died."""

    agent: str
    topic: str
    partition: int
    position: int
    deaths: int


class Plan(Message):
    """What one agent process is to run."""

    process: str  # "count_words#0"
    groups: list[GroupPlan]
    address: str  # path of the Unix socket it answers on
    runtime_dir: str
    datadir: str
    careful: bool  # the last process died at work: write down each event before it runs
    parked: list[Suspect]  # events that go to the dead letters unseen
    leader: bool  # timers with on_leader run here
    alone: bool  # all groups of the app are in this process
    canary: bool = False  # open the stores, say Ready, take nothing, end with 0
    waits: bool = False  # its tasks, timers and cron jobs start at `Begin`, not at once
    early: bool = False  # the log is not there yet: nothing of it is opened before `Open`
    gateway: str = ""  # "host:port" at which other hosts reach this one's pages; "": nowhere


class Fork(Message):
    """Master → zygote: fork a process that runs `plan`. Four descriptors come with it:
    its end of the link, its log pipe, its beat page, its dump file."""

    id: int
    plan: Plan


class Forked(Message):
    """Zygote → master: the process exists and becomes the master's child.

    Told by the process itself and by who forked it, in any order.
    """

    id: int
    pid: int


class ForkFailed(Message):
    """Zygote → master: the fork itself failed."""

    id: int
    error: str


# Master and agent process, over the process's link.


class Ready(Message):
    """The process reads (or, without agents, serves)."""

    groups: list[str]


class Owns(Message):
    """The partitions of `group` that this process has; sent at each change."""

    group: str
    generation: int
    active: list[int]
    recovering: list[int]
    scattered: list[str] = []  # tables with keys outside of the partition they hash to


class StandbyRow(Message):
    """A partition of a table that another host has and this process follows."""

    table: str
    partition: int
    behind: int | None  # records of its changelog that are not read; None: not known yet


class Stats(Message):
    """A process's counters, each second; totals since it started."""

    events: dict[str, int]  # agent → events settled
    lag: dict[str, int]  # agent → events behind, all partitions
    tables: dict[str, int]  # table → keys held here
    checkpoints: int
    checkpoint_ms: float  # mean of the last ones
    errors: int
    retries: int
    dead_letters: int
    sent: int
    busy_with: list[str]  # "count_words: proj-posts[3]@1042 for 2.1 s", the longest first
    waits_for: str = ""  # a cluster that is away, a long recovery
    client: dict[str, float] = {}  # on Kafka, what its clients count of themselves
    standby: list[StandbyRow] = []


class Note(Message):
    """Something for the instance's history, e.g. a dead letter."""

    level: str
    text: str


class Draining(Message):
    """The process was told to stop and still works on this."""

    left: list[str]


class Failing(Message):
    """The process cannot go on and ends by itself with this reason."""

    message: str
    seen: list[str]
    remedy: str | None
    exit_code: int


class Owner(Message):
    """One process and what it has of a group."""

    group: str
    process: str
    address: str
    slot: int
    slots: int
    active: list[int]
    recovering: list[int]
    scattered: list[str] = []  # see `Owns`


class Owners(Message):
    """Master → every agent process and the web process, at each change."""

    generation: int
    owners: list[Owner]


class Begin(Message):
    """Master → agent process: the whole instance runs, its pages too: start what runs by the
    clock."""


class Open(Message):
    """Master → agent process: the log is there and knows the app's topics: open it."""


class Leave(Message):
    """Master → agent process, before TERM: it ends for good, so that others may have what it
    has at once. Who is only replaced keeps its partitions for its successor."""


class DumpTasks(Message):
    """Master → agent process: append the stacks of asyncio tasks to the dump file."""


# Anybody → the socket of an agent process.


class PageRequest(Message):
    """Web → process: run the view of `route`."""

    route: int
    partition: int  # -1: the page names no table
    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    body: bytes
    match_info: dict[str, str]
    client: str


class PageReply(Message):
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Moved(Message):
    """The process does not own what was asked for (any more)."""

    generation: int


class Unavailable(Message):
    """Recovering, or what was written was taken back: ask again."""

    reason: str
    retry_after_s: float


class Lookup(Message):
    """Committed value of a key, key in the table's own key codec → `Found` | `Missing`."""

    table: str
    key: bytes
    partition: int  # -1: any partition that this process owns


class LookupText(Message):
    """The same for a key typed by a person or found in a URL → `Found` with JSON."""

    table: str
    text: str
    partition: int


class Found(Message):
    value: bytes
    partition: int


class Missing(Message):
    """No such key; `default` is what the table's default gives, if it has one."""

    default: bytes | None


class RouteKey(Message):
    """Encode a key of a URL with the table's route codec → `RoutedKey`."""

    table: str
    text: str


class RoutedKey(Message):
    partition: int


class Scan(Message):
    """Keys of a table that begin so, committed, sorted → `Scanned`."""

    table: str
    prefix: str
    limit: int


class Scanned(Message):
    rows: list[tuple[str, str]]  # JSON of key and value
    total: int


# Anybody → the log's socket (embedded log).


class OutRecord(Message):
    topic: str
    key: bytes | None
    value: bytes | None
    partition: int = -1  # -1: by key, or any
    timestamp: float = 0.0  # 0: now
    headers: list[tuple[str, bytes]] = []


class Append(Message):
    """Append, durable against power loss when answered → `Appended`."""

    records: list[OutRecord]


class Appended(Message):
    placed: list[tuple[int, int]]  # partition, offset


class LogTopics(Message):
    """→ `LogTopicsReply`."""


class LogTopic(Message):
    name: str
    ends: list[tuple[int, int]]  # low, next offset; one a partition
    size_bytes: int
    owned: bool


class LogTopicsReply(Message):
    topics: list[LogTopic]


class Lag(Message):
    """How far each agent is, by partition → `Lags`."""


class LagRow(Message):
    """Where an agent is in one partition. On Kafka these are records: one may hold many events,
    which only who reads it knows."""

    agent: str
    topic: str
    partition: int
    position: int | None  # offset of the next one to read; None: nothing was read yet
    end: int  # the offset after the last one
    behind: int


class Lags(Message):
    """By agent, topic and partition. The log on Kafka also sends it to the master by itself."""

    rows: list[LagRow]


class Declare(Message):
    """Master → log: topics and tables of the app → `Done` | `Refusal`."""

    topics: list[TopicInfo]
    tables: list[TableInfo]
    groups: list[GroupInfo]
    retention_s: float | None = None  # of topics that name none; None: for ever
    settings: dict[str, Any] = {}  # of the app, as `Hello` has them; for Kafka


class Fetch(Message):
    """Records of a partition from an offset on; waits up to `wait_s` for the first.

    On Kafka several events may travel as one record: they have one offset and are told apart
    by their index. Fetching on from a record means from `offset`, `index + 1` of it.
    """

    topic: str
    partition: int
    offset: int
    limit: int
    wait_s: float
    index: int = 0


class FetchedRecord(Message):
    offset: int
    key: bytes | None
    value: bytes | None
    timestamp: float
    headers: list[tuple[str, bytes]]
    index: int = 0


class Fetched(Message):
    records: list[FetchedRecord]


class LogState(Message):
    """Log → master, each second: how the log's file does."""

    wal_bytes: int
    size_bytes: int
    holder_pid: int = 0  # has had the turn to write for `holder_s`, 0: nobody
    holder_s: float = 0.0


# Anybody → the log's socket (Kafka).


class Describe(Message):
    """Who has what of a group, on all hosts, as the cluster says → `Described`."""

    group: str


class Member(Message):
    """A process of any host."""

    name: str  # its client id
    gateway: str  # of its host; "": it cannot be asked from elsewhere
    partitions: list[int]


class Described(Message):
    members: list[Member]
    settled: bool  # False: partitions are being given to others, nobody is said to have any


# Gateway → the gateway of another host, by HTTP.


class Hop(Message):
    """Ask the process of your host that has a partition of a group → its answer, a frame."""

    app_id: str
    gateway: str  # who is asked
    group: str
    partition: int
    request: bytes  # a frame: a `PageRequest` or a question about a table


# The web process, over its link to the master.


class Site(Message):
    """Master → web: what to serve; again after a reload."""

    app_id: str
    instance: str
    routes: list[RouteInfo]
    tables: list[TableInfo]
    settings: dict[str, Any]
    gateway: str = ""  # see `Plan`
    runtime_dir: str = ""


class Snapshot(Message):
    """Master → web, each second: the whole state, as `docs/status.md` describes."""

    data: bytes  # JSON


# Command line and web → master, over the control socket or the web's link.


class Command(Message):
    """`verb` is one of `supervisor/control.py`'s; answered by `Document`s."""

    verb: str
    args: dict[str, Any] = {}


class Document(Message):
    data: Any


ANY = (
    Done | End | Refusal | Import | Hello | ImportFailed | Fork | Forked | ForkFailed
    | Ready | Owns | Stats | Note | Draining | Failing | Owners | DumpTasks | Leave
    | PageRequest | PageReply | Moved | Unavailable | Lookup | LookupText | Found | Missing
    | RouteKey | RoutedKey | Scan | Scanned | Append | Appended | LogTopics | LogTopicsReply
    | Declare | Fetch | Fetched | Begin | Open | Site | Snapshot | Command | Document
    | LogState | Lag | Lags | Describe | Described | Hop
)  # fmt: skip

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[int, ANY]).decode


def encode_frame(id: int, message: Message) -> bytes:
    """One frame, ready to be written.

    Raises:
        WireError: The message is larger than a frame may be.
    """
    body = _encode((id, message))
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(
            f"a {type(message).__name__} of {len(body)} bytes is larger than a frame may be "
            f"({MAX_FRAME_BYTES} bytes)"
        )
    return len(body).to_bytes(4, "big") + body


def decode_frame(data: bytes) -> Message:
    """The message of one whole frame.

    Raises:
        WireError: It is no frame, or has more or less than one.
    """
    messages = [message for _, message in FrameReader().feed(data)]
    if len(messages) != 1:
        raise WireError(f"{len(data)} bytes are {len(messages)} whole frames; expected 1")
    return messages[0]


class FrameReader:
    """Turns bytes, cut anywhere, into (id, message) pairs."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._max_frame_bytes = max_frame_bytes

    def feed(self, data: bytes) -> Iterator[tuple[int, Message]]:
        """Add `data` and yield every frame that is whole now, in order.

        Raises:
            WireError: The bytes are no frame; the connection is of no use any more.
        """
        self._buffer += data
        start, end = 0, len(self._buffer)
        try:
            while end - start >= 4:
                size = int.from_bytes(self._buffer[start : start + 4], "big")
                if size > self._max_frame_bytes:
                    raise WireError(
                        f"a frame of {size} bytes was announced; "
                        f"at most {self._max_frame_bytes} are taken"
                    )
                if end - start - 4 < size:
                    break
                body = bytes(self._buffer[start + 4 : start + 4 + size])
                start += 4 + size
                try:
                    yield _decode(body)
                except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
                    raise WireError(
                        f"a frame of {size} bytes is not a message: {error}"
                    ) from error
        finally:
            del self._buffer[:start]
