"""Which process has which partitions, as the processes say it themselves."""

from streamd.wire import Owner, Owners, Owns


class OwnerMap:
    """The owners of an instance; `generation` grows with every change."""

    def __init__(self) -> None:
        self.generation = 0
        self._owners: dict[tuple[str, str], Owner] = {}  # (process, group) -> what it has

    def set(self, process: str, address: str, slot: int, slots: int, owns: Owns) -> bool:
        """Take what a process says about a group; True if that is new."""
        owner = Owner(
            owns.group,
            process,
            address,
            slot,
            slots,
            sorted(owns.active),
            sorted(owns.recovering),
            owns.scattered,
        )
        if self._owners.get((process, owns.group)) == owner:
            return False
        self._owners[process, owns.group] = owner
        self.generation += 1
        return True

    def drop(self, process: str) -> bool:
        """Forget a process that ended; True if it had something."""
        gone = [key for key in self._owners if key[0] == process]
        for key in gone:
            del self._owners[key]
        self.generation += bool(gone)
        return bool(gone)

    def partitions(self, process: str) -> list[int]:
        """The partitions that a process has, of all its groups."""
        found = {
            partition
            for (name, _), owner in self._owners.items()
            if name == process
            for partition in (*owner.active, *owner.recovering)
        }
        return sorted(found)

    def by_process(self) -> dict[str, list[int]]:
        """The partitions of every process that has some, of all its groups."""
        found: dict[str, set[int]] = {}
        for (process, _), owner in self._owners.items():
            found.setdefault(process, set()).update(owner.active, owner.recovering)
        return {process: sorted(partitions) for process, partitions in found.items()}

    def frame(self) -> Owners:
        """The whole map, as it is sent to everybody."""
        return Owners(self.generation, list(self._owners.values()))
