"""The rows of a partition as recovery finds them: those of a store, and newer changes."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Rows:
    """See the module.

    Attributes:
        stored: As a store holds them.
        changes: What a changelog says since; key -> value, None: deleted.
        all: Every row that is there; set by `fold`.
    """

    stored: list[tuple[bytes, bytes]] = field(default_factory=list)
    changes: dict[bytes, bytes | None] = field(default_factory=dict)
    all: list[tuple[bytes, bytes]] = field(default_factory=list)

    def fold(self) -> None:
        """Put together what is there; nothing is changed after it."""
        changes = self.changes
        if not changes:
            self.all = self.stored
            return
        self.all = [row for row in self.stored if row[0] not in changes]
        self.all += [(key, value) for key, value in changes.items() if value is not None]

    def values_of(self, keys: set[bytes]) -> dict[bytes, bytes | None]:
        """The value of each key, None where it has none."""
        found: dict[bytes, bytes | None] = dict.fromkeys(keys)
        if keys:
            found |= {key: value for key, value in self.stored if key in keys}
            found |= {key: self.changes[key] for key in keys if key in self.changes}
        return found
