"""What becomes of an event whose agent raises.

    streamd -A examples/retries.py worker -l info
    streamd -A examples/retries.py send orders '{"id": "a", "amount": 4}'
    streamd -A examples/retries.py send orders '{"id": "b", "amount": -1}'
    curl 127.0.0.1:6066/orders/

A failed try leaves nothing behind: neither its write to the table nor what it sent is seen.
"""

import json

import streamd

# One partition: so few orders need no more, and every key is in it.
app = streamd.App("retries", topic_partitions=1, retry_backoff="20ms")


class Order(streamd.Record):
    id: str
    amount: int


orders_topic = app.topic("orders", value_type=Order)
hints_topic = app.topic("hints", value_type=str)
dead_letters_topic = app.topic("retries-dead-letters", value_serializer="raw")

charged = app.Table("charged", default=int, help="Amount of each order that was charged.")
hints = app.Table("hints", default=int, help="How often each hint came.")
given_up = app.Table("given_up", default=str, help="Why each order was given up.")

tries: dict[str, int] = {}  # in memory, and so no part of what a failed try takes back


class CardRefused(Exception):
    """The bank says no."""


# The default: try again with back-off, `retries` times, then put it into the dead letters.
@app.agent(orders_topic, on_error="retry", retries=2, group="shop")
async def charge(orders):
    """Charge the card; a negative amount fails each time, an odd one the first time."""
    async for order in orders:
        tries[order.id] = tries.get(order.id, 0) + 1
        charged[order.id] += order.amount
        if order.amount < 0 or (order.amount % 2 and tries[order.id] == 1):
            raise CardRefused(f"order {order.id}: {order.amount}")


# For what is worth nothing later: a log line, and on with the next.
@app.agent(hints_topic, on_error="skip", group="shop")
async def suggest(texts):
    """Remember hints, but no empty ones."""
    async for text in texts:
        if not text:
            raise ValueError("an empty hint")
        hints[text] += 1


# Dead letters are records like others: the value as it came, and why in the headers.
@app.agent(dead_letters_topic, group="shop")
async def mourn(letters):
    """Note what was given up."""
    async for event in letters.events():
        given_up[json.loads(event.value)["id"]] = event.headers["streamd-error"].decode()


@app.page("/orders/")
async def get_orders(web, request):
    """What was charged, what was given up, and how often each order was tried."""
    return web.json(
        {
            "charged": dict(charged.items()),
            "given_up": dict(given_up.items()),
            "hints": dict(hints.items()),
            "tries": tries,
        }
    )
