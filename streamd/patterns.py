"""Topics that are named by a pattern: which ones it means (pure).

A topic of an app that begins with `^` is a pattern, by which all topics of the cluster are read
whose whole name matches; no topic's own name may hold that character.
"""

import re
from collections.abc import Iterable

MARK = "^"


def is_pattern(name: str) -> bool:
    """Does it name topics by a pattern?"""
    return name.startswith(MARK)


def own_topics(app_id: str, declared: Iterable[str]) -> re.Pattern[str]:
    """What matches the topics that no pattern means: the app's own, and the cluster's.

    Args:
        declared: The app's own among those that it names: its agents'.
    """
    named = "|".join(map(re.escape, declared)) or r"(?!)"
    ours = r"-(?:.*-changes|.*-markers|dead-letters|leader|reply-.*)"
    return re.compile(f"__.*|{named}|{re.escape(app_id)}{ours}")


def matching(pattern: str, names: Iterable[str], own: re.Pattern[str]) -> list[str]:
    """The topics of these names that a pattern means, sorted.

    >>> names = ["news-de", "news-fr", "old-news-de", "news-count-markers", "news-app.count"]
    >>> matching("^news-.*", names, own_topics("news", ["news-app.count"]))
    ['news-de', 'news-fr']
    """
    return sorted(name for name in names if means(pattern, name) and not own.fullmatch(name))


def means(pattern: str, name: str) -> bool:
    """Does a pattern match the whole of a topic's name?"""
    return re.fullmatch(pattern.removeprefix(MARK), name) is not None
