"""A real English text that every machine with Python has, as posts: what Python's own help says
about the language, a paragraph a post.
"""

import functools
import re
from pydoc_data import topics


@functools.cache
def posts() -> tuple[str, ...]:
    """The paragraphs, in order; each holds a word at least."""
    pages = topics.topics.values()
    paragraphs = (part for page in pages for part in re.split(r"\n\s*\n", page))
    return tuple(part for part in paragraphs if part.strip())


@functools.cache
def words() -> tuple[str, ...]:
    """The words of all posts, as the app tells them apart."""
    return tuple(word for post in posts() for word in post.split())
