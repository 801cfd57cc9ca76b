"""`worker` and `start`: decide what must hold before user code, take the lock, and become
(foreground) or spawn (daemon) the guardian.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec

import streamd
from streamd.cli import kill, output, target
from streamd.cli.options import DURATION, Given, color_wanted, given, setting_option
from streamd.cli.root import Command
from streamd.config import bootstrap
from streamd.errors import Busy, NotPermitted, StreamdError
from streamd.instance import (
    TREE_VARIABLE,
    Folder,
    StartSpec,
    identify,
    instance_name,
    new_tree,
)

# How long an unknown holder of the lock is waited for before it counts as a survivor. Before
# that it may be a probe, or one who has just taken it and not yet said so.
UNKNOWN_HOLDER_S = 1.0

# How long who lives without the lock may take to end; then its lock file was deleted.
WITHOUT_LOCK_S = 2.0
ENDING_S = 0.05  # between two looks at an instance that stops

# Of the log of a daemon that did not come up; not where the sentence says all: not permitted,
# no broker, busy, wrong settings.
LAST_LINES = 8
TOLD_WHOLE = (4, 69, 75, 78)
GUARDIAN_END_S = 2.0  # for the guardian to say how the master ended

# After so long without news it is said what is waited for.
SILENCE_S = 5.0


def web_options() -> list[click.Parameter]:
    """The options of whatever runs an app, or prepares it."""
    return [
        setting_option(
            "web_port",
            "-p",
            "--web-port",
            metavar="PORT",
            type=click.IntRange(0, 65535),
            help="Port of the stats page; 0 picks a free one. [default: 6066]",
        ),
        setting_option(
            "web_bind",
            "-b",
            "--web-bind",
            metavar="ADDR",
            help="Address or unix:/path to listen on. [default: 127.0.0.1]",
        ),
        setting_option(
            "web_host",
            "--web-host",
            metavar="HOST",
            help="Name other hosts reach this one by. [default: the hostname]",
        ),
        setting_option(
            "web_enabled",
            "--with-web/--without-web",
            help="Serve the stats page. [default: with-web]",
        ),
        setting_option(
            "grace",
            "--grace",
            metavar="DURATION",
            help="How long a warm stop may take.",
        ),
    ]


def worker() -> None:
    """Run everything in one process, in the foreground.

    The same tree as with `start`, with all groups in one agent process. Ctrl-C stops it:
    once lets what runs finish, twice does not.
    """
    run_foreground(given(), "worker")


worker_command = Command("worker", callback=worker, help=worker.__doc__, params=web_options())


def start(foreground: bool, wait: bool, timeout: float, dry_run: bool) -> int:
    """Start the daemon: a process for each group, and the stats page.

    Returns when every process is ready, and prints the address of the stats page. Under
    systemd, or as process 1 of a container, it stays in the foreground by itself. Starting
    what already runs is no error.
    """
    options = given()
    if dry_run:
        # The only form of a start that imports the app here.
        from streamd.cli.check import plan  # noqa: PLC0415

        return plan()
    if foreground or os.getpid() == 1 or is_systemds():
        run_foreground(options, "start")
    return run_daemon(options, wait=wait, timeout_s=timeout)


start_command = Command(
    "start",
    callback=start,
    help=start.__doc__,
    params=[
        click.Option(
            ["-F", "--foreground"], is_flag=True, help="Stay attached, log to the terminal."
        ),
        click.Option(
            ["--wait/--no-wait"],
            default=True,
            show_default=True,
            help="Wait until every process is ready.",
        ),
        click.Option(
            ["-t", "--timeout"],
            type=DURATION,
            default="60s",
            show_default=True,
            help="How long to wait for ready.",
        ),
        click.Option(
            ["--dry-run"],
            is_flag=True,
            help="Only say what would be made: groups, and topics on Kafka.",
        ),
        *web_options(),
    ],
)


def is_systemds() -> bool:
    """True if systemd started this process and waits for its words or its sockets' service."""
    return "NOTIFY_SOCKET" in os.environ or os.environ.get("LISTEN_PID") == str(os.getpid())


def run_foreground(options: Given, mode: str) -> NoReturn:
    """Become the guardian; the process keeps its pid and its terminal.

    Raises:
        Busy: An instance of this name runs.
    """
    spec = make_spec(options, mode, foreground=True)
    folder = Folder(Path(spec.folder))
    lock = take_lock(folder, spec)
    if isinstance(lock, Running):
        raise lock.busy()
    output.note(f"streamd {streamd.__version__} · {spec.name} · {mode} (Ctrl-C stops it)")
    become_guardian(spec, lock, -1)


def run_daemon(options: Given, *, wait: bool, timeout_s: float) -> int:
    """Spawn the guardian and wait for the tree to be ready; the exit code."""
    spec = make_spec(options, "start", foreground=False)
    folder = Folder(Path(spec.folder))
    lock = take_lock(folder, spec)
    if isinstance(lock, Running):
        if lock.app not in (None, spec.app):
            raise lock.busy()
        if options.json:
            output.say_json(lock.document())
        else:
            click.echo(lock.sentence() + " Nothing done.")
        return 0
    if not options.json:
        click.echo(f"streamd {streamd.__version__} · {spec.name}")
    ready_fd, pid = spawn_guardian(spec, lock)
    if not wait:
        os.close(ready_fd)
        if options.json:
            output.say_json({"schema": "streamd.start/1", "ready": False, "pid": pid})
        else:
            click.echo(f"Starting (pid {pid}). Look: streamd status --name {spec.name}")
        return 0
    try:
        return Progress(spec, pid, json_wanted=options.json).show(ready_fd, timeout_s)
    except KeyboardInterrupt:
        click.echo(
            f"\nWaiting stopped; {spec.name} (pid {pid}) goes on starting. "
            f"Stop: streamd stop --name {spec.name}",
            err=True,
        )
        return 130


def make_spec(options: Given, mode: str, *, foreground: bool) -> StartSpec:
    """Everything that is decided before user code, and the runtime folder, made.

    Raises:
        UsageError: No app is named.
        ConfigError: A setting has a value that cannot be used.
        NotPermitted: The runtime folder cannot be made.
    """
    app = target.app_of(options)
    config_file = target.settings_file(options)
    early = bootstrap(os.environ, config_file, options.settings)
    name = _name_of(options, app)
    folder = Folder.of(name)
    folder.make()
    color = color_wanted(options.color)
    return StartSpec(
        app=app,
        name=name,
        mode=mode,
        foreground=foreground,
        options=options.settings,
        config_file=str(config_file) if config_file else None,
        workdir=str((early.workdir or Path()).absolute()),
        folder=str(folder.path),
        tree=new_tree(),
        logfile=str(early.logfile.absolute()) if early.logfile else None,
        loglevel=early.loglevel,
        log_format=early.log_format,
        color=sys.stderr.isatty() if color is None else color,
        user=early.user,
        group=early.group,
        umask=early.umask,
        nofile=early.nofile,
        nproc=early.nproc,
        core_bytes=early.core,
        nice=early.nice,
        env=early.env,
        log_max_size_bytes=early.log_max_size or 0,
        log_max_age_s=early.log_max_age or 0.0,
        log_keep=early.log_keep,
    )


def _name_of(options: Given, app: str) -> str:
    """The instance's name; beside one that runs on another data directory, one of its own.

    So a second worker of an app needs no more than a data directory and a port.
    """
    named = target.named_instance(options)
    name = target.instance_of(app, named)
    datadir = options.settings.get("datadir")
    if named is not None or datadir is None:
        return name
    folder = Folder.of(name)
    record = folder.read_record()
    if record is None or not record.datadir or target.living(folder) is None:
        return name
    here = Path(datadir).absolute()
    return name if here == Path(record.datadir) else instance_name("", f"{name}@{here.name}")


class Running:
    """The instance of this name that is there already."""

    def __init__(self, folder: Folder, pid: int) -> None:
        holder, record = target.read_holder(folder), folder.read_record()
        self.name = folder.path.name
        self.pid = record.master.pid if record and record.master.is_alive() else pid
        self.app = holder.app if holder else record.app if record else None
        self.since = holder.since if holder else record.started_at if record else None
        self.web = record.web if record else ""
        self.starting = not folder.control_path.exists()

    def sentence(self) -> str:
        """ "Already running for 12 s (pid 4711)." """
        word = "starting" if self.starting else "running"
        span = f" for {output.duration(time.time() - self.since)}" if self.since else ""
        return f"Already {word}{span} (pid {self.pid})."

    def document(self) -> dict[str, Any]:
        """What `start --json` says of it, in the form of a start that was carried out."""
        ready = not self.starting
        return {
            "schema": "streamd.start/1", "ready": ready, "pid": self.pid, "web": self.web,
            "after_s": 0.0, "already": True,
        }  # fmt: skip

    def busy(self) -> Busy:
        """The refusal of a second master for the same instance."""
        return Busy(
            f"{self.name} runs already (pid {self.pid}): one master owns a log",
            seen=[
                f"it runs {self.app}" if self.app else "it is starting",
                "more processes for a group: streamd scale GROUP=N",
                "a second instance here: another --name, --datadir and --web-port",
                "shared work on several hosts: broker kafka://…",
            ],
            remedy=f"streamd stop --name {self.name}, or streamd scale GROUP=N",
        )


def take_lock(folder: Folder, spec: StartSpec) -> int | Running:
    """The lock's descriptor, or who runs.

    Survivors of a dead master are ended first; the end of an instance that was told to stop is
    waited for.

    Raises:
        NotPermitted: What holds the lock cannot be ended.
    """
    began = known_at = time.monotonic()
    has_said = False
    while True:
        lock, who = folder.try_lock(), target.living(folder)
        now = time.monotonic()
        if who is not None and who.pid == os.getpid():
            who = None
        if lock is not None and who is None:
            before = target.read_holder(folder)
            # At once, for others end whom they do not know. What is left of the last tree may
            # have to be looked for: its marker stays until that is done.
            record_holder(lock, spec, before.tree if before is not None else "")
            if not kill.has_leftovers(folder, before):
                break
        if lock is not None:
            os.close(lock)
        if who is not None or lock is not None:
            known_at = now
        if who is not None and is_stopping(folder):
            if not has_said:
                output.note(
                    f"{folder.path.name} (pid {who.pid}) is stopping; waits for its end."
                )
            has_said, began = True, now
            time.sleep(ENDING_S)
        elif who is not None and (lock is None or now - began > WITHOUT_LOCK_S):
            return Running(folder, who.pid)
        elif who is None and (lock is not None or now - known_at > UNKNOWN_HOLDER_S):
            end_survivors(folder)
        else:
            time.sleep(0.01)
    # What the last master wrote is not true any more, and would be taken for this one's.
    folder.record_path.unlink(missing_ok=True)
    folder.control_path.unlink(missing_ok=True)
    record_holder(lock, spec, spec.tree)
    return lock


def is_stopping(folder: Folder) -> bool:
    """True if the instance that has the lock was told to stop."""
    holder, record = target.read_holder(folder), folder.read_record()
    if record is None or not record.stopping:
        return False
    # The record of the tree before says nothing of one that is only starting.
    return holder is None or holder.tree == record.tree


def end_survivors(folder: Folder) -> None:
    """Kill what is left of a tree whose guardian and master are dead; say so.

    Raises:
        NotPermitted: Something of it cannot be ended.
    """
    report = kill.end_tree(folder)
    if not report.is_complete:
        raise NotPermitted(
            f"the lock {folder.lock_path} is held by what cannot be ended",
            seen=[str(process) for process in report.survivors],
            remedy=f"sudo streamd kill --tree --name {folder.path.name}",
        )
    if report.killed:
        output.note(
            f"{folder.path.name} had died and left "
            f"{output.plural(len(report.killed), 'process')}; ended, going on."
        )


def record_holder(lock: int, spec: StartSpec, marker: str) -> None:
    """Say in the lock that this process is the guardian of the tree of this marker."""
    target.write_holder(
        lock,
        target.Holder(marker, identify(os.getpid()), spec.app, spec.mode, time.time()),
    )


def become_guardian(spec: StartSpec, lock: int, ready_fd: int) -> NoReturn:
    """Replace this process by the guardian, as `docs/internals.md` says under Start."""
    spec = msgspec.structs.replace(spec, ready_fd=ready_fd)
    spec_fd = os.memfd_create("streamd-spec")
    os.write(spec_fd, msgspec.json.encode(spec))
    os.lseek(spec_fd, 0, os.SEEK_SET)
    for fd in (spec_fd, lock, ready_fd):
        if fd >= 0:
            os.set_inheritable(fd, True)
    guardian = target.room_path("supervisor", "guardian.py")
    environment = {**os.environ, TREE_VARIABLE: spec.tree, "PYTHONHASHSEED": "0"}
    if not target.is_found_anywhere():
        # `python -m streamd` in a clone: the processes to come work in other folders.
        paths = [str(Path(streamd.__file__).parents[1]), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    sys.stdout.flush()
    sys.stderr.flush()
    # Python ignores SIGPIPE, and what is ignored stays so in whatever the user spawns.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # The guardian lets them in once its handlers stand: what comes before is obeyed.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    numbers = [str(spec_fd), str(lock), str(ready_fd)]
    os.execve(sys.executable, [sys.executable, "-I", "-S", guardian, *numbers], environment)


def spawn_guardian(spec: StartSpec, lock: int) -> tuple[int, int]:
    """Start the guardian as a daemon; the descriptor of its progress, and its pid.

    Forked twice and in a session of its own, so that nothing of this terminal reaches it.
    """
    progress, ready_fd = os.pipe()
    told, tell = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _detach(spec, lock, ready_fd, tell)
    os.close(ready_fd)
    os.close(tell)
    # The tree holds the lock from now on; kept here too, it would outlive the tree.
    os.close(lock)
    os.waitpid(child, 0)
    pid = int(os.read(told, 20) or b"0")
    os.close(told)
    return progress, pid


def _detach(spec: StartSpec, lock: int, ready_fd: int, tell: int) -> NoReturn:
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        record_holder(lock, spec, spec.tree)
        os.write(tell, str(os.getpid()).encode())
        # What the caller's shell had open is not the daemon's to hold.
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in (lock, ready_fd):
                with contextlib.suppress(OSError):
                    os.close(fd)
        null = os.open(os.devnull, os.O_RDWR)
        # What is written before the master has its log file, and little else.
        early = os.open(early_log(spec), os.O_WRONLY | os.O_TRUNC | os.O_CREAT, 0o600)
        for fd, stream in ((null, 0), (null, 1), (early, 2)):
            os.dup2(fd, stream)
        become_guardian(spec, lock, ready_fd)
    except BaseException as error:
        problem = {"message": f"the guardian cannot be started: {error}", "exit_code": 70}
        with contextlib.suppress(OSError):
            os.write(ready_fd, json.dumps({"error": problem}).encode() + b"\n")
        os._exit(70)


def early_log(spec: StartSpec) -> Path:
    """Where the stderr of a daemon goes."""
    return Path(spec.folder) / "start.log"


class Progress:
    """What a starting tree tells, shown as it comes."""

    def __init__(self, spec: StartSpec, pid: int, *, json_wanted: bool) -> None:
        self._spec = spec
        self._pid = pid
        self._json = json_wanted
        self._shown: dict[str, str] = {}  # process -> the state last shown
        self._buffer = b""

    def show(self, fd: int, timeout_s: float) -> int:
        """Read lines until the tree is ready; the exit code.

        Raises:
            StreamdError: The start failed, or `timeout_s` was not enough.
        """
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while True:
            left_s = deadline - time.monotonic()
            if not poll.poll(max(0.0, min(left_s, SILENCE_S)) * 1000):
                if left_s <= SILENCE_S:
                    raise self._too_late(timeout_s)
                self._note_waiting()
                continue
            data = os.read(fd, 65536)
            if not data:
                raise self._gone()
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in filter(None, lines):
                if self._take(json.loads(line)):
                    return 0

    def _note_waiting(self) -> None:
        waiting = [
            f"{name} ({state})" for name, state in self._shown.items() if state != "ready"
        ]
        output.note(f"  waiting for {', '.join(waiting) or 'the master'}")

    def _take(self, told: dict[str, Any]) -> bool:
        """Show one line; True when it is the last."""
        if problem := told.get("error"):
            failed = StartFailed(problem)
            if (
                not failed.seen
                and not failed.user_traceback
                and failed.exit_code not in TOLD_WHOLE
            ):
                failed.seen = last_lines(self._spec)
            raise failed
        if told.get("ready"):
            if self._json:
                output.say_json({"schema": "streamd.start/1", **told})
                return True
            web = f" Stats: {told['web']}" if told.get("web") else ""
            more = f" --name {self._spec.name}" if len(target.running()) > 1 else ""
            click.echo(
                f"Running.{web}   Stop: streamd stop{more}   Logs: streamd logs -f{more}"
            )
            return True
        process, state = str(told.get("process")), str(told.get("state"))
        if self._json or self._shown.get(process) == state:
            return False
        self._shown[process] = state
        if state == "starting":
            return False
        after = f"{told['after_s']:.1f} s" if "after_s" in told else ""
        click.echo(
            f"  {process:<18}{output.colored(f'{state:<10}', state)}{after:>6}   "
            f"{told.get('detail') or ''}".rstrip()
        )
        return False

    def _too_late(self, timeout_s: float) -> StreamdError:
        waiting = [name for name, state in self._shown.items() if state != "ready"]
        error = StreamdError(
            f"{self._spec.name} (pid {self._pid}) is not ready after {timeout_s:g} s; "
            "it goes on starting",
            seen=[f"{name} is {self._shown[name]}" for name in waiting],
            remedy=f"streamd logs --name {self._spec.name}, or --timeout with more",
        )
        error.exit_code = 124
        return error

    def _gone(self) -> StreamdError:
        target.wait_unlocked(Folder(Path(self._spec.folder)), GUARDIAN_END_S)
        error = StreamdError(
            f"{self._spec.name} ended before it was ready",
            seen=last_lines(self._spec),
            remedy=f"streamd -A {self._spec.app} start --foreground",
        )
        error.exit_code = 70
        return error


class StartFailed(StreamdError):
    """The tree told why it cannot run."""

    def __init__(self, problem: dict[str, Any]) -> None:
        super().__init__(
            problem["message"], seen=problem.get("seen") or (), remedy=problem.get("remedy")
        )
        self.exit_code = problem.get("exit_code") or 1
        shown = problem.get("traceback") or ""
        # The finder's errors have it among what was seen.
        self.user_traceback = "" if shown.splitlines() == self.seen else shown


def last_lines(spec: StartSpec) -> list[str]:
    """The last lines that a daemon which did not come up has written."""
    record = Folder(Path(spec.folder)).read_record()
    logs = [early_log(spec)]
    if spec.logfile is not None:
        logs.append(Path(spec.logfile))
    elif record is not None and record.tree == spec.tree and record.datadir:
        logs.append(Path(record.datadir) / "streamd.log")
    lines = []
    for path in logs:
        with contextlib.suppress(OSError):
            lines += path.read_text(errors="replace").splitlines()[-LAST_LINES:]
    return lines[-LAST_LINES:]
