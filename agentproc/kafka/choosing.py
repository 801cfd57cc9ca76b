"""Who follows which partitions as a standby, by who has what (pure).

Every process of a group asks the cluster for the same list of members and works out the same
choice from it, so nothing need be agreed on. A copy on the owner's own host would be the file
that the owner has written anyway: any process there may open it. So copies are made on other
hosts only, and by one process of each.
"""

from hashlib import blake2b

from streamd.agentproc.kafka.members import installation_of
from streamd.wire import Described


def followed(found: Described, name: str, copies: int) -> set[int]:
    """The partitions that the member `name` is to follow.

    Args:
        found: All members, and what each has.
        copies: On so many hosts beside the owner's, where there are as many.

    >>> from streamd.wire import Member
    >>> a, b = Member("x;g;0;one", "x", [0, 1]), Member("y;g;0;two", "y", [2])
    >>> found = Described([a, b], settled=True)
    >>> followed(found, a.name, 1), followed(found, b.name, 1), followed(found, b.name, 0)
    ({2}, {0, 1}, set())
    """
    hosts: dict[str, list[str]] = {}
    for member in found.members:
        hosts.setdefault(installation_of(member.name), []).append(member.name)
    mine = installation_of(name)
    chosen: set[int] = set()
    for member in found.members:
        others = hosts.keys() - {installation_of(member.name)}
        for partition in member.partitions:
            if mine in _first(others, partition, copies):
                if [name] == _first(hosts[mine], partition, 1):
                    chosen.add(partition)
    return chosen


def _first(names: "set[str] | list[str]", partition: int, count: int) -> list[str]:
    """Some of these names: others for another partition, the same while none is added."""
    return sorted(names, key=lambda name: _weight(name, partition))[:count]


def _weight(name: str, partition: int) -> bytes:
    return blake2b(f"{partition} {name}".encode(), digest_size=8).digest()
