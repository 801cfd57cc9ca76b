"""The text that the benches count: English that every Python brings along, as posts."""

import itertools
import pydoc_data.topics
from collections import Counter

WORDS_A_POST = 20


def posts(words: int) -> tuple[list[str], Counter[str]]:
    """At least `words` words as posts, and how often each word is in them."""
    text = " ".join(pydoc_data.topics.topics.values()).split()
    endless = itertools.cycle(text)
    made = [
        " ".join(itertools.islice(endless, WORDS_A_POST))
        for _ in range(-(-words // WORDS_A_POST))
    ]
    return made, Counter(itertools.chain.from_iterable(post.split() for post in made))
