"""Count words: a table, filled by one agent, shown by two pages.

streamd -A examples/word_count.py worker -l info
streamd -A examples/word_count.py send posts 'the cat and the dog'
curl 127.0.0.1:6066/count/the/
curl '127.0.0.1:6066/count/?word=the'
"""

import streamd

app = streamd.App("word-count", topic_partitions=4)

posts_topic = app.topic("posts", value_type=str)
word_counts = app.Table("word_counts", default=int, help="Keep count of words (str to int).")


class Word(streamd.Record):
    word: str


@app.agent(posts_topic)
async def shuffle_words(posts):
    """Send every word to the partition where it is counted."""
    async for post in posts:
        for word in post.split():
            await count_words.send(key=word, value=Word(word=word))


@app.agent(value_type=Word)
async def count_words(words):
    """Count words from blog posts."""
    async for word in words:
        word_counts[word.word] += 1


# The key is a part of the path …
@app.page("/count/{word}/")
@app.table_route(table=word_counts, match_info="word")
async def get_count(web, request, word):
    return web.json({word: word_counts[word]})


# … or a parameter of the query.
@app.page("/count/")
@app.table_route(table=word_counts, query_param="word")
async def get_count_by_query(web, request):
    word = request.query["word"]
    return web.json({word: word_counts[word]})
