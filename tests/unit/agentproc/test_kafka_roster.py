"""Asking a cluster who is in a group, while nobody answers."""

import pytest
from confluent_kafka.admin import AdminClient

from streamd.agentproc.kafka import members
from streamd.agentproc.kafka.members import Roster
from streamd.agentproc.kafka.topics import Away


def test_who_does_not_wait_any_longer_leaves_the_question_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A question whose own time ends before its answer comes aborts the process.
    monkeypatch.setattr(members, "ASK_S", 0.2)
    roster = Roster(AdminClient({"bootstrap.servers": "127.0.0.1:1", "log_level": 0}))
    asked = set()
    for _ in range(4):
        with pytest.raises(Away):
            roster.ask("group")
        asked |= set(roster._asked.values())
    [only] = asked
    assert not only.done()
