"""May a local store be used for what a changelog holds? By its mark and the group's marker.

A store holds what counted at a checkpoint, when nobody else had written to the changelog below
its offset. What came since is read from the changelog; this asks whether that can be enough.
"""

from streamd.agentproc.kafka.markers import Marker
from streamd.agentproc.store.file import Mark

# A deleted key's record must still be there when it is read: compaction may take it after a
# day, since changelogs have that as their lag.
STALE_S = 20 * 3600.0


def distrust(
    mark: Mark, marker: Marker, topic: str, topic_id: str, low: int, high: int, now: float
) -> str:
    """Why a store is not to be used; "" where it may be (pure).

    Args:
        mark: What the store says of itself.
        marker: The one that counts.
        topic: The changelog, which is `topic_id`, and holds records from `low` up to `high`.
        now: Unix seconds.
    """
    if mark.topic_id != topic_id:
        return f"topic {topic} was made anew since"
    if mark.resets != marker.resets:
        return "the group was reset since"
    if mark.offset > high:
        return f"it holds up to offset {mark.offset}, the changelog ends at {high}"
    if mark.offset < low:
        return f"it holds up to offset {mark.offset}, the changelog begins at {low}"
    if mark.incarnation != marker.incarnation:
        # Its writer may have gone on after it was replaced, for nobody.
        if mark.offset > marker.starts.get(topic, 0):
            return "it was written by an owner that was replaced"
    elif mark.number > marker.number:
        return f"it holds checkpoint {mark.number}, the last that counts is {marker.number}"
    is_whole = (mark.incarnation, mark.number) == (marker.incarnation, marker.number)
    if not is_whole and not 0 <= now - mark.moment <= STALE_S:
        return f"it is {(now - mark.moment) / 3600:.0f} h old"
    return ""
