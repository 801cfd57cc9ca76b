"""Who the processes run as: names, numbers, and who may not change."""

import os
import pwd
from pathlib import Path

import pytest

from streamd.errors import ConfigError, NotPermitted
from streamd.supervisor import limits

NOBODY = 65534


def test_without_user_and_group_nothing_changes() -> None:
    person = limits.person_of(None, None)

    assert (person.uid, person.gid) == (os.geteuid(), os.getegid())


def test_a_user_by_name_and_by_number_is_the_same() -> None:
    entry = pwd.getpwnam("nobody")

    by_name, by_number = (
        limits.person_of("nobody", None),
        limits.person_of(str(entry.pw_uid), None),
    )

    assert by_name == by_number
    assert (by_name.uid, by_name.gid, by_name.home) == (
        entry.pw_uid, entry.pw_gid, entry.pw_dir,
    )  # fmt: skip


def test_a_number_without_an_entry_has_a_group_of_its_own() -> None:
    person = limits.person_of("4000001", None)

    assert (person.name, person.uid, person.gid) == (None, 4000001, 4000001)


def test_a_group_may_be_another_than_the_users() -> None:
    assert limits.person_of("nobody", "77").gid == 77


@pytest.mark.parametrize(
    ("user", "group", "text"),
    [("no-such-user", None, "names nobody"), (None, "no-such-group", "names no group")],
)
def test_who_does_not_exist_is_named(user: str | None, group: str | None, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{text}: 'no-such-"):
        limits.person_of(user, group)


def test_only_root_can_become_another_user(tmp_path: Path) -> None:
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(NOBODY)
    try:
        with pytest.raises(NotPermitted, match="only root can change that"):
            limits.become(limits.person_of("1", None), tmp_path)
    finally:
        if was_root:
            os.seteuid(0)
