"""A run of random attacks on an instance under load."""

import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chaos_oracle import drain, problems
from chaos_tree import Load, Tree, complaints, eventually, instance, kill

from streamd.agentproc.broker import TP, Checkpoint, Output, Session, Subscription
from streamd.agentproc.broker.embedded import EmbeddedBroker
from streamd.errors import Fenced
from streamd.partition import partition_for

# What is done, and how often in comparison; the last ones end the whole tree.
ATTACKS = {
    "agent": 60,
    "agents": 6,  # several at the same moment
    "zygote": 8,
    "web": 4,
    "log": 10,
    "all": 2,  # everything below the master
    "stop": 3,  # SIGSTOP, until it is replaced or goes on
    "pause": 2,  # the master, for a moment
    "reload": 3,
    "scale": 4,
    "steal": 4,  # another process claims a group's partitions
    "master": 5,
    "guardian": 2,
    "warm": 2,
    "cold": 2,
}
GROUPS = {
    "split": ({"proj.split": ["posts"]}, {}, 1),
    "count": ({"proj.count": ["proj-proj.count"]}, {"word_counts": 4}, 2),
    "bank": (
        {"proj.bank": ["transfers"], "proj.deposit": ["deposits"]},
        {"accounts": 2, "deposited": 2},
        1,
    ),
}


@dataclass
class Report:
    """What a run did and found."""

    seed: int
    spent: Counter[str] = field(default_factory=Counter)
    events: int = 0
    took_s: float = 0.0
    problems: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.spent.total()} attacks "
            f"({', '.join(f'{name} {count}' for name, count in self.spent.most_common())}), "
            f"{self.events} records acknowledged, {self.took_s:.1f} s: "
            + ("; ".join(self.problems) or "exact")
        )


class Attacker:
    """Attacks one instance, by the dice of one seed."""

    def __init__(
        self,
        made: Tree,
        seed: int,
        attacks: Mapping[str, int] = ATTACKS,
        others: Mapping[str, Callable[[random.Random], bool]] | None = None,
    ) -> None:
        self._made = made
        self._chance = random.Random(seed)
        self._attacks = attacks
        self._others = others or {}
        self.spent: Counter[str] = Counter()

    def strike(self) -> None:
        """One attack; what it ended is started again by who should, or by us."""
        name = self._chance.choices(list(self._attacks), list(self._attacks.values()))[0]
        way = self._others.get(name)
        if way(self._chance) if way is not None else self.carry_out(name):
            self.spent[name] += 1

    def carry_out(self, name: str) -> bool:
        """Carry an attack out; False when there was nothing to attack."""
        made, chance = self._made, self._chance
        pids = made.processes()
        agents = {each: pid for each, pid in pids.items() if "#" in each}
        match name:
            case "agent" | "stop" if agents:
                pid = agents[chance.choice(sorted(agents))]
                return kill(pid, signal.SIGSTOP if name == "stop" else signal.SIGKILL)
            case "agents" if agents:
                chosen = chance.sample(sorted(agents), max(1, len(agents) // 2))
                return any([kill(agents[each]) for each in chosen])
            case "all":
                below = [pids[e] for e in pids if e not in ("master", "guardian")]
                return any([kill(pid) for pid in below])
            case "zygote" | "web" | "log" if name in pids:
                return kill(pids[name])
            case "pause" if "master" in pids:
                kill(pids["master"], signal.SIGSTOP)
                time.sleep(chance.uniform(0.1, 1.5))
                return kill(pids["master"], signal.SIGCONT)
            case "reload" if "master" in pids:
                # To the guardian of a worker with a terminal it would mean a stop.
                return kill(pids["master"], signal.SIGHUP)
            case "scale" if "split#0" in pids:
                made.command("scale", f"split={chance.randint(1, 4)}")
                return True
            case "steal":
                asyncio.run(self._steal(chance.choice(["split", "split", "count", "bank"])))
                return True
            case "master" | "guardian" if name in pids:
                kill(pids[name])
                made.assert_nothing_left()
                self._start_again()
                return True
            case "warm":
                made.stop()
                self._start_again()
                return True
            case "cold" if "guardian" in pids:
                kill(pids["guardian"], signal.SIGQUIT)
                made.assert_nothing_left(5.0)
                self._start_again()
                return True
        return False

    def _start_again(self) -> None:
        self._made.start(self._chance.choice(["start", "worker"]))

    async def _steal(self, group: str) -> None:
        agents, tables, slots = GROUPS[group]
        slot = self._chance.randrange(slots)
        broker = EmbeddedBroker(self._made.datadir, self._made.place, 4)
        session = broker.session(Subscription("proj", group, slot, slots, agents, tables))
        await session.open()
        if group == "split":
            await self._split(session)
        await session.close()
        await broker.close()

    async def _split(self, session: Session) -> None:
        """Do some of the work, which whoever goes on as if nothing was would double."""
        with contextlib.suppress(TimeoutError, Fenced):
            batches = await asyncio.wait_for(session.poll(100), 0.5)
            words: dict[int, list[bytes]] = defaultdict(list)
            for post in (json.loads(value or b"") for b in batches for value in b.values):
                for word in post.split():
                    words[partition_for(word.encode(), 4)].append(word.encode())
            outputs = [
                Output(TP("proj-proj.count", p), list(w), list(map(_quoted, w)), [1.0] * len(w))
                for p, w in words.items()
            ]
            positions = {("proj.split", batch.tp): batch.end for batch in batches}
            await session.commit(Checkpoint(outputs, [], positions))
            self.spent["steal and work"] += 1


def _quoted(word: bytes) -> bytes:
    return b'"%s"' % word


def run(attacks: int, seed: int, pause_s: float = 0.25) -> Report:
    """Start, attack, drain, stop, compare."""
    report = Report(seed)
    began_at = time.monotonic()
    chance = random.Random(seed)
    with instance() as made:
        made.start(chance.choice(["start", "worker"]))
        attacker = Attacker(made, seed)
        with Load(made, seed) as load:
            eventually(lambda: load.batches > 3, "events flow")
            while attacker.spent.total() < attacks:
                time.sleep(chance.uniform(0.0, 2 * pause_s))
                attacker.strike()
            before = load.batches
            eventually(lambda: load.batches > before, "events flow in the end", 30.0)
        eventually(lambda: made.state() == "running", "all runs in the end", 30.0)
        drain(made)
        made.stop()
        report.spent, report.events = attacker.spent, len(load.acked)
        report.problems = problems(made, load.acked)
        report.complaints = complaints(made)
        report.took_s = time.monotonic() - began_at
        assert not report.problems, f"{report}\n{keep(made)}"
    return report


def keep(made: Tree) -> Path:
    """Where the log of the run is, while it is kept."""
    return made.logfile
