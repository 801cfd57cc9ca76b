"""What must hold before any code of the user's runs: limits, environment, folder, user.

The master takes all of it on itself, so every process of the tree below the guardian has it.
The order matters: what only root may do comes first, then the user is changed and cannot be
changed back, then the folder is entered as that user would.
"""

import grp
import logging
import os
import pwd
import resource
import stat
from dataclasses import dataclass
from pathlib import Path

from streamd.errors import ConfigError, NotPermitted, StreamdError
from streamd.instance import StartSpec

log = logging.getLogger(__name__)

LIMITS = {
    "nofile": resource.RLIMIT_NOFILE,
    "nproc": resource.RLIMIT_NPROC,
    "core_bytes": resource.RLIMIT_CORE,
}


@dataclass(frozen=True, slots=True)
class Person:
    """Who the processes are to run as."""

    name: str | None  # None: a number without an entry in the user database
    uid: int
    gid: int
    home: str | None


def prepare(spec: StartSpec) -> None:
    """Make this process what the spec says.

    Raises:
        StreamdError: Something of it cannot be set.
    """
    for variable in spec.env:
        name, _, value = variable.partition("=")
        os.environ[name] = value
    set_limits(spec)
    person = person_of(spec.user, spec.group)
    if (person.uid, person.gid) != (os.geteuid(), os.getegid()):
        become(person, Path(spec.folder))
    try:
        os.chdir(spec.workdir)
        if spec.umask is not None:
            os.umask(spec.umask)
    except OSError as error:
        raise StreamdError(
            f"the working folder {spec.workdir} cannot be entered: {error.strerror}",
            remedy="choose another with --workdir",
        ) from error


def set_limits(spec: StartSpec) -> None:
    """Set resource limits and the nice value.

    Raises:
        NotPermitted: A limit is above what this user may have.
    """
    for name, number in LIMITS.items():
        wanted = getattr(spec, name)
        if wanted is None:
            continue
        _, hard = resource.getrlimit(number)
        allowed = wanted if hard == resource.RLIM_INFINITY else max(wanted, hard)
        try:
            resource.setrlimit(number, (wanted, allowed))
        except (OSError, ValueError) as error:
            raise NotPermitted(
                f"the limit {name.removesuffix('_bytes')}={wanted} cannot be set: "
                f"this user may have {hard}",
                remedy="choose a lower one, or raise the hard limit of the user",
            ) from error
    if spec.nice is not None:
        # Only ever less: to take more needs a right that few users have.
        os.setpriority(os.PRIO_PROCESS, 0, max(spec.nice, os.getpriority(os.PRIO_PROCESS, 0)))


def person_of(user: str | None, group: str | None) -> Person:
    """Who the settings `user` and `group` name, each a name or a number.

    Raises:
        ConfigError: There is no such user or group.
    """
    if user is None:
        person = Person(None, os.geteuid(), os.getegid(), None)
    elif user.isdecimal():
        person = _person_by_number(int(user))
    else:
        try:
            entry = pwd.getpwnam(user)
        except KeyError as error:
            raise ConfigError(
                f"the setting user names nobody: {user!r}",
                remedy="name a user of this host, or a number",
            ) from error
        person = Person(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir)
    if group is None:
        return person
    try:
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise ConfigError(
            f"the setting group names no group: {group!r}",
            remedy="name a group of this host, or a number",
        ) from error
    return Person(person.name, person.uid, gid, person.home)


def _person_by_number(uid: int) -> Person:
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return Person(None, uid, os.getegid() if uid == os.geteuid() else uid, None)
    return Person(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir)


def become(person: Person, folder: Path) -> None:
    """Be that user for good; the runtime folder becomes his.

    Raises:
        NotPermitted: This process is not root's, so it cannot.
    """
    if os.geteuid() != 0:
        raise NotPermitted(
            f"this process is uid {os.geteuid()}, gid {os.getegid()}, and was to run as uid "
            f"{person.uid}, gid {person.gid}: only root can change that",
            remedy="start it as that user: User= in systemd, or sudo -u NAME streamd …",
        )
    for path in (folder, *folder.iterdir()):
        os.chown(path, person.uid, person.gid, follow_symlinks=False)
    os.setgroups([])
    os.setgid(person.gid)
    if person.name is not None:
        os.initgroups(person.name, person.gid)
    os.setuid(person.uid)
    refuse_if_root_again(person)
    for variable, value in (
        ("HOME", person.home), ("USER", person.name), ("LOGNAME", person.name)
    ):  # fmt: skip
        if value is not None:
            os.environ[variable] = value
    # What is run in the tree finds this instance where root has it.
    os.environ.setdefault("STREAMD_RUNTIME_DIR", str(folder.parent))
    os.environ.pop("XDG_RUNTIME_DIR", None)


def refuse_if_root_again(person: Person) -> None:
    """Make sure that there is no way back.

    Raises:
        NotPermitted: There is one.
    """
    if person.uid == 0:
        return
    try:
        os.setuid(0)
    except PermissionError:
        return
    raise NotPermitted(f"the rights of root could not be given up for uid {person.uid}")


def warn_of_root(workdir: str) -> None:
    """Say so when root runs code that anybody can change."""
    if os.geteuid() != 0:
        return
    try:
        mode = os.stat(workdir).st_mode
    except OSError:
        return
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        log.warning(
            "root runs code from %s, which every user of this host can change: "
            "name another with --user, or take the right to write from others",
            workdir,
        )
