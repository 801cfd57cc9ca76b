"""Which agents run together, and where everything else runs.

Agents that name the same table share a group, unless `group=` says otherwise. A table belongs
to the group of the agents that name it. A task, timer, cron job or page that names tables of
one group runs there; one that names none, or several groups' tables, runs in `app`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from streamd.agents import Agent
from streamd.errors import AppError
from streamd.tables import Table
from streamd.uses import Uses

APP_GROUP = "app"
RESERVED = ("app", "master", "zygote", "guardian", "log", "web")


@dataclass
class Group:
    """Agents that share a consumer group and run together in each of its processes."""

    name: str
    agents: list[Agent] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    why: str = ""

    @property
    def processes(self) -> int:
        """How many processes it has: the most that any of its agents asks for."""
        return max((agent.processes for agent in self.agents), default=1)

    @property
    def auto(self) -> bool:
        """True if the number follows how far it is behind, as one of its agents asks for."""
        return any(agent.auto for agent in self.agents)

    @property
    def restart(self) -> str:
        """When its processes are started again: what its agents say, else "permanent"."""
        said = [agent.restart for agent in self.agents if agent.restart is not None]
        return said[0] if said else "permanent"

    @property
    def max_memory_bytes(self) -> int:
        """Above how much private memory a process is replaced; 0: its agents do not say."""
        said = [agent.max_memory_bytes for agent in self.agents if agent.max_memory_bytes]
        return max(said, default=0)

    @property
    def nice(self) -> int:
        """How much its processes give way: the least that any of its agents asks for."""
        return min((agent.nice or 0 for agent in self.agents), default=0)


def work_out(
    agents: Sequence[Agent],
    tables: Sequence[Table],
    uses: Mapping[str, Uses],
    others: Iterable[Uses],
) -> list[Group]:
    """Group the agents, sources first, and set `.group` of agents and tables.

    Args:
        uses: Agent name -> what its function uses.
        others: What tasks, timers, cron jobs and pages use; a table that only they name gets
            a group of its own.

    Raises:
        AppError: Two groups would write one table, or a name is taken.
    """
    names = _merge(agents, uses)
    groups: dict[str, Group] = {}
    for agent in agents:
        group = groups.setdefault(names[agent.name], Group(names[agent.name]))
        group.agents.append(agent)
        agent.group = group.name
    _refuse_two_restarts(groups.values())
    _place_tables(tables, agents, uses, groups)
    for used in others:
        for table in used.tables.values():
            if not table.group:
                table.group = table.name
                groups.setdefault(table.name, Group(table.name)).tables.append(table)
    for group in groups.values():
        group.why = _why(group, uses)
    return _sources_first(list(groups.values()), uses)


def home_of(used: Uses) -> str:
    """The group in which a task, timer, cron job or page runs."""
    homes = {table.group for table in used.tables.values()}
    return homes.pop() if len(homes) == 1 else APP_GROUP


def _merge(agents: Sequence[Agent], uses: Mapping[str, Uses]) -> dict[str, str]:
    """Agent name -> group name."""
    leader = {agent.name: agent.name for agent in agents}
    order = list(leader)

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    first_with: dict[str, str] = {}  # table, or group that was asked for -> agent
    for agent in agents:
        if agent.group_wanted is not None:
            ties = [f"group {agent.group_wanted}"]
        else:
            ties = [f"table {name}" for name in uses[agent.name].tables]
        for tie in ties:
            if (other := first_with.setdefault(tie, agent.name)) != agent.name:
                # The earlier agent leads: a group is named by its first agent.
                first, second = sorted((find(agent.name), find(other)), key=order.index)
                leader[second] = first
    by_name = {agent.name: agent for agent in agents}
    return {
        agent.name: agent.group_wanted
        or by_name[find(agent.name)].group_wanted
        or by_name[find(agent.name)].label
        for agent in agents
    }


def _refuse_two_restarts(groups: Iterable[Group]) -> None:
    for group in groups:
        said = {agent.restart: agent.name for agent in group.agents if agent.restart}
        if len(said) > 1:
            raise AppError(
                f"the agents of group {group.name!r} share a process and say different things "
                "about its restart: "
                + ", ".join(f"{name} says {kind!r}" for kind, name in said.items()),
                remedy="give them the same restart=, or groups of their own",
            )


def _place_tables(
    tables: Sequence[Table],
    agents: Sequence[Agent],
    uses: Mapping[str, Uses],
    groups: Mapping[str, Group],
) -> None:
    for table in tables:
        naming = {agent.group for agent in agents if table.name in uses[agent.name].tables}
        writing = {
            agent.group: agent.name
            for agent in agents
            if table.name in uses[agent.name].written
        }
        if len(writing) > 1:
            raise AppError(
                f"table {table.name!r} is written in {len(writing)} groups: "
                + ", ".join(f"{name} (agent {agent})" for name, agent in writing.items()),
                remedy="give these agents the same group=, or send the changes to one of them",
            )
        candidates = set(writing) or naming
        if candidates:
            table.group = min(candidates, key=list(groups).index)
            groups[table.group].tables.append(table)


def _why(group: Group, uses: Mapping[str, Uses]) -> str:
    if not group.agents:
        return f"holds table {group.tables[0].name}, which no agent names"
    if len(group.agents) == 1:
        return "one agent"
    shared = [
        table.name
        for table in group.tables
        if sum(table.name in uses[agent.name].tables for agent in group.agents) > 1
    ]
    if shared:
        return "its agents share " + ", ".join(f"table {name}" for name in shared)
    return f"its agents have group={group.name!r}"


def _sources_first(groups: list[Group], uses: Mapping[str, Uses]) -> list[Group]:
    """Order by the flow of events; groups in a cycle keep the order of their definition."""
    home = {agent.name: group.name for group in groups for agent in group.agents}
    reads = {
        name: group.name
        for group in groups
        for agent in group.agents
        for name in agent.get_topic_names()
    }
    targets: dict[str, set[str]] = {group.name: set() for group in groups}
    for group in groups:
        for agent in group.agents:
            used = uses[agent.name]
            targets[group.name] |= {home[name] for name in used.agents if name in home}
            targets[group.name] |= {reads[name] for name in used.topics if name in reads}
        targets[group.name].discard(group.name)
    ordered: list[Group] = []
    left = list(groups)
    while left:
        fed = set().union(*(targets[group.name] for group in left))
        ready = [group for group in left if group.name not in fed] or left[:1]
        ordered += ready
        left = [group for group in left if group not in ready]
    return ordered


def refuse_reserved(groups: Sequence[Group]) -> None:
    """See that no group has the name of a process of streamd.

    Raises:
        AppError: One has.
    """
    for group in groups:
        if group.name in RESERVED:
            raise AppError(
                f"a group cannot be named {group.name!r}: a process of streamd is",
                remedy="rename the agent's function, or give it a group= of another name",
            )


def refuse_foreign_writes(who: str, group: str, used: Uses) -> None:
    """See that code which runs in `group` writes its tables only.

    Raises:
        AppError: It writes another's.
    """
    for name in sorted(used.written):
        home = used.tables[name].group
        if home != group:
            raise AppError(
                f"{who} writes table {name!r}, which belongs to group {home!r}; "
                f"it runs in {group!r}, and a table is written only in its own group",
                remedy=f"send the change to an agent of {home!r}, or put both in one group "
                f"with group={home!r}",
            )


def place_partitions(groups: Sequence[Group]) -> None:
    """Give each table as many partitions as the topics that its group reads.

    Raises:
        AppError: These differ, or the table is to have others.
    """
    for group in groups:
        counts = {
            topic.name: topic.partition_count
            for agent in group.agents
            for topic in agent.channel.parts
        }
        if group.tables and len(set(counts.values())) > 1:
            raise AppError(
                f"group {group.name!r} has tables and reads topics of different partition "
                "counts: "
                + ", ".join(f"{topic} has {count}" for topic, count in counts.items()),
                remedy="give the topics the same partitions=",
            )
        wanted = next(iter(counts.values()), None)
        for table in group.tables:
            if wanted is not None and table.partitions not in (None, wanted):
                raise AppError(
                    f"table {table.name!r} has {table.partitions} partitions and topic "
                    f"{next(iter(counts))!r} has {wanted}: a table has those of its topic",
                    remedy="leave partitions= of the table out",
                )
            table.partitions = wanted or table.partitions or 1


def shared_globals(agents: Mapping[str, Agent], uses: Mapping[str, Uses]) -> list[str]:
    """Warnings of globals that agents of several groups use."""
    warnings: list[str] = []
    users: dict[int, dict[str, str]] = {}  # id of a global -> group -> agent
    names: dict[int, str] = {}
    for name, used in uses.items():
        for shared, called in used.shared.items():
            users.setdefault(shared, {}).setdefault(agents[name].group, name)
            names.setdefault(shared, called)
    for shared, groups in users.items():
        if len(groups) > 1:
            warnings.append(
                f"agents {', '.join(sorted(groups.values()))} use the global "
                f"{names[shared]}, but run in different processes, which share no globals; "
                "keep it in a table, or give them one group="
            )
    return warnings
