"""The guardian: starts the master, passes signals on, and leaves nothing behind.

    python -I -S guardian.py SPEC_FD LOCK_FD READY_FD

It stays in the terminal's foreground group and holds nothing that could fail: no loop, no user
code, no package. When the master ends, by itself or killed, the guardian, a subreaper, kills
until it has no child, and ends with the master's exit code: 70 when a signal ended the master.

It also passes the master's messages on to systemd, which listens to its main process only.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from streamd.supervisor import cgroups, tree
else:
    # With -I the script's own folder is not on the path.
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    import cgroups
    import tree

PASSED = ("TERM", "QUIT", "USR1", "USR2", "TTIN", "TTOU")
FIRST_LISTENER = 3  # where the descriptors begin that systemd hands over

# A process that is killed may take a while to give its memory back; one that does not end in
# this time is in the hands of the kernel, and waited for no longer.
GROUP_S = 2.0
LAST_S = 3.0

EXIT_COLD = 3
EXIT_MASTER_KILLED = 70


class Guardian:
    """One run of the guardian."""

    def __init__(self, spec: "dict[str, Any]", fds: list[int]) -> None:
        self._spec = spec
        self._fds = fds  # spec, lock, ready: the master's arguments
        self._master = 0
        self._interrupts = 0
        self._killed_by_us = False
        self._notify: socket.socket | None = None
        self._cgroup: str | None = None
        hangs_up = has_terminal() and spec["foreground"]
        self._hang_up_means = signal.SIGTERM if hangs_up else signal.SIGHUP

    def run(self) -> int:
        """Start the master and wait for its end; the exit code."""
        tree.become_subreaper()
        tree.show_as("guardian")
        wakeup, wakeup_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup_end, warn_on_full_buffer=False)
        self._install_handlers()
        self._cgroup = cgroups.make(self._spec["tree"])
        self._spawn_master()
        poll = select.poll()
        poll.register(wakeup, select.POLLIN)
        if self._notify is not None:
            poll.register(self._notify, select.POLLIN)
        while (status := self._master_status()) is None:
            for fd, _ in poll.poll():
                if fd == wakeup:
                    for number in os.read(wakeup, 512):
                        self._pass_on(number)
                elif self._notify is not None:
                    self._relay(self._notify)
        return self._end(status)

    def _install_handlers(self) -> None:
        names = [*PASSED, "ABRT", "INT", "TSTP", "CHLD"]
        # nohup ignores HUP before it starts us, and means it.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            names.append("HUP")
        for name in names:
            # The wakeup descriptor tells; the handler only has to exist.
            signal.signal(getattr(signal, f"SIG{name}"), lambda number, frame: None)
        # Whoever started this has blocked them for the time until now.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _spawn_master(self) -> None:
        environment = dict(os.environ)
        environment["STREAMD_GUARDIAN"] = str(os.getpid())
        environment["STREAMD_CGROUP"] = self._cgroup or ""
        if environment.pop("NOTIFY_SOCKET", ""):
            self._notify, masters_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            masters_end.set_inheritable(True)
            environment["STREAMD_NOTIFY_FD"] = str(masters_end.fileno())
            if environment.pop("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
                environment.pop("WATCHDOG_USEC", None)
        listeners = self._take_listeners(environment)
        for fd in (*self._fds, *listeners):
            if fd >= 0:
                os.set_inheritable(fd, True)
        # -P: the working folder is the user's, and a file in it may have any name.
        command = [sys.executable, "-P", "-m", "streamd.supervisor", *map(str, self._fds)]
        self._master = os.posix_spawn(
            sys.executable,
            command,
            environment,
            setsid=True,
            # Blocked until its handlers stand: what comes before is obeyed, and kills nobody.
            setsigmask=[getattr(signal, f"SIG{name}") for name in (*PASSED, "HUP")],
            setsigdef=[*(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})],
        )
        if self._notify is not None:
            masters_end.close()
        # The command line waits for the end of file of the ready pipe: only the master has it.
        for fd in (self._fds[0], self._fds[2], *listeners):
            if fd > 2:
                os.close(fd)

    def _take_listeners(self, environment: "dict[str, str]") -> list[int]:
        """The sockets that systemd listens on for us; the master is told their names.

        They are for one process: variables that name another were only inherited.
        """
        owner = environment.pop("LISTEN_PID", "")
        count = environment.pop("LISTEN_FDS", "")
        names = environment.pop("LISTEN_FDNAMES", "").split(":")
        if owner != str(os.getpid()) or not count.isdecimal():
            return []
        fds = range(FIRST_LISTENER, FIRST_LISTENER + int(count))
        listeners = [fd for fd in fds if fd not in self._fds and is_open(fd)]
        named = [(names + [""] * int(count))[fd - FIRST_LISTENER] for fd in listeners]
        environment["STREAMD_LISTENERS"] = ":".join(
            f"{fd}={name}" for fd, name in zip(listeners, named, strict=True)
        )
        return listeners

    def _master_status(self) -> "os.waitid_result | None":
        """How the master ended; None: it lives. Orphans that have come here are reaped.

        As process 1 of a container the guardian gets whatever anybody leaves behind in it.
        """
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == self._master:
                return ended
            os.waitpid(ended.si_pid, 0)
        return None

    def _pass_on(self, number: int) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            order = (signal.SIGTERM, signal.SIGQUIT, signal.SIGKILL)
            number = order[min(self._interrupts, 3) - 1]
            self._killed_by_us = number == signal.SIGKILL
        elif number == signal.SIGHUP:
            number = self._hang_up_means
        elif number == signal.SIGTSTP:
            self._say("Ctrl-Z is refused: stopped processes lose their partitions; Ctrl-C ends")
            return
        elif number == signal.SIGCHLD:
            return
        os.kill(self._master, number)
        if number == signal.SIGABRT:
            # systemd's watchdog: the master does not turn. It shows its stacks and dies, also
            # when it is stopped.
            os.kill(self._master, signal.SIGCONT)

    def _relay(self, notify: socket.socket) -> None:
        message = notify.recv(65536)
        address = os.environ["NOTIFY_SOCKET"]
        if address.startswith("@"):
            address = "\0" + address[1:]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            try:
                out.sendto(message, address)
            except OSError:
                # Nobody listens: systemd is gone, or it was a test.
                return

    def _end(self, status: "os.waitid_result") -> int:
        if self._cgroup is not None:
            cgroups.kill(self._cgroup, limit_s=GROUP_S)
        survivors = tree.kill_children(LAST_S)
        if self._cgroup is not None:
            cgroups.remove(self._cgroup)
        for found in survivors:
            self._say(f"UNKILLABLE: {found.pid} {found.command} ({tree.held_in(found.pid)})")
        if status.si_code == os.CLD_EXITED:
            return int(status.si_status)
        if self._killed_by_us:
            return EXIT_COLD
        name = signal.Signals(status.si_status).name
        self._say(
            f"the master (pid {self._master}) was ended by {name}; its tree was ended too"
        )
        return EXIT_MASTER_KILLED

    def _say(self, text: str) -> None:
        line = f"streamd: {self._spec['name']}: {text}\n".encode(errors="replace")
        # By its path: a daemon's log file may have been moved away and made anew.
        path = self._spec["logfile"] or self._daemon_log() or "/dev/stderr"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError:
            fd = 2
        with contextlib.suppress(OSError):  # a terminal that was closed
            os.write(fd, line)

    def _daemon_log(self) -> str | None:
        """The file that the master of a daemon writes to, once it knows the data directory."""
        if self._spec["foreground"]:
            return None
        try:
            with open(os.path.join(self._spec["folder"], "instance.json"), "rb") as file:
                datadir = json.load(file)["datadir"]
        except (OSError, ValueError, KeyError):
            return None
        return os.path.join(datadir, "streamd.log") if datadir else None


def is_open(fd: int) -> bool:
    """True if there is such a descriptor."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def has_terminal() -> bool:
    """True if this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def main() -> "NoReturn":
    """Run the guardian with the descriptors of the arguments."""
    fds = [int(argument) for argument in sys.argv[1:4]]
    size = os.fstat(fds[0]).st_size
    spec = json.loads(os.pread(fds[0], size, 0))
    code = Guardian(spec, fds).run()
    os._exit(code)


if __name__ == "__main__":
    main()
