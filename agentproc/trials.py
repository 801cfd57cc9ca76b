"""Events that are not handed out as the others are: they failed, or cannot be tried at all.

A trial is kept by agent and position until a checkpoint holds the event's end, so it outlives
the roll-back that follows its own failure, and that of another event.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamd.agentproc.broker import TP
from streamd.agents import Agent
from streamd.config import Settings
from streamd.errors import StreamdError
from streamd.secrets import mask
from streamd.wire import Suspect

if TYPE_CHECKING:
    from streamd.agentproc.runs import Run

log = logging.getLogger(__name__)

RETRY_MAX_S = 5.0


@dataclass
class Trial:
    """An event that is not handed out as the others are."""

    tries: int = 0  # that failed
    not_before: float = 0.0  # monotonic; when it may be tried again
    refused: str | None = None  # it is not tried (again), for this reason
    error: str = ""  # the last one
    skip: bool = False  # refused without a dead letter


class Trials:
    """The trials of one group."""

    def __init__(self, settings: Settings, parked: Iterable[Suspect]) -> None:
        self._settings = settings
        self._trials: dict[tuple[str, TP, int], Trial] = {
            (s.agent, TP(s.topic, s.partition), s.position): Trial(
                tries=s.deaths, refused=f"it took its process down {s.deaths} times"
            )
            for s in parked
        }
        self.retries = 0  # tries that were granted

    def mark(self, run: "Run", agent: str) -> None:
        """Set apart the events of a run that are on trial."""
        for (name, tp, position), trial in self._trials.items():
            if name == agent and tp == run.tp:
                index = bisect_left(run.positions, position)
                if run.cursor <= index < len(run) and run.positions[index] == position:
                    run.try_apart(index, trial)

    def forget_durable(self, committed: Mapping[tuple[str, TP], int]) -> None:
        """Drop the trials of events that a checkpoint has settled."""
        if not self._trials:
            return
        self._trials = {
            (agent, tp, position): trial
            for (agent, tp, position), trial in self._trials.items()
            if committed.get((agent, tp), 0) <= position
        }

    def judge(self, agent: Agent, run: "Run", index: int, error: BaseException) -> None:
        """An event failed: say whether and when it is tried again.

        Raises:
            StreamdError: The agent's `on_error` is "stop".
        """
        settings = self._settings
        place = f"{run.tp}@{run.positions[index]}"
        key = (agent.name, run.tp, run.positions[index])
        trial = self._trials.setdefault(key, Trial())
        trial.tries += 1
        trial.error = mask(f"{type(error).__name__}: {error}")
        policy = agent.on_error or settings.on_error
        retries = settings.retries if agent.retries is None else agent.retries
        if policy == "stop":
            raise stopped(agent.name, place, trial.error) from error
        if policy == "skip":
            trial.refused, trial.skip = "on_error is skip", True
            next_step = "it is skipped"
        elif trial.tries > retries:
            trial.refused = f"{trial.tries} tries failed"
            next_step = "it goes to the dead letters"
        else:
            self.retries += 1
            pause_s = min(settings.retry_backoff * 2 ** (trial.tries - 1), RETRY_MAX_S)
            trial.not_before = time.monotonic() + pause_s
            next_step = f"try {trial.tries + 1} of {retries + 1} in {_pause(pause_s)}"
        log.error(
            "agent %s failed on %s: %s; %s",
            agent.name, place, trial.error, next_step, exc_info=error,
        )  # fmt: skip


def _pause(pause_s: float) -> str:
    return f"{pause_s * 1000:.0f} ms" if 0.0 < pause_s < 0.1 else f"{pause_s:.1f} s"


def stopped(agent: str, place: str, error: str) -> StreamdError:
    """What ends a group whose agent must not go on."""
    ended = StreamdError(
        f"agent {agent!r} stops at {place}: {error}",
        remedy="mend the agent and start its group again: nothing was lost",
    )
    ended.exit_code = 78
    return ended
