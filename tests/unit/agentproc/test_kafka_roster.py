"""Asking a cluster who is in a group, while nobody answers."""

import time

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
        asked |= {each.answer for each in roster._asked.values()}
    [only] = asked
    assert not only.done()


def test_a_question_without_an_answer_is_asked_anew_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(members, "ANEW_S", 0.05)
    roster = Roster(AdminClient({"bootstrap.servers": "127.0.0.1:1", "log_level": 0}))
    asked = [roster.question("group")]
    deadline = time.monotonic() + 20
    while len(asked) < 4:
        assert time.monotonic() < deadline
        if (last := roster.question("group")) is not asked[-1]:
            asked.append(last)
    assert roster._asked["group"].pause_s == 0.4
    assert not any(answer.done() for answer in asked)
