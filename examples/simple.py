"""A module that is also its own command line.

python examples/simple.py worker -l info
python examples/simple.py produce --max-messages 1000
python examples/simple.py my-daemon --foo 2.5
python examples/simple.py --help
"""

import asyncio
import random
from itertools import count

from click import option

import streamd

PRODUCE_LATENCY = 0.5  # seconds

app = streamd.App("simple")


class Withdrawal(streamd.Record):
    user: str
    country: str
    amount: float


withdrawals_topic = app.topic("withdrawals", key_type=str, value_type=Withdrawal)
totals = app.Table("totals", default=float, help="Withdrawn by each user.")


@app.agent(withdrawals_topic)
async def track_withdrawals(withdrawals):
    """Add up what each user withdraws."""
    async for withdrawal in withdrawals:
        totals[withdrawal.user] += withdrawal.amount


@app.page("/total/{user}/")
@app.table_route(table=totals, match_info="user")
async def get_total(web, request, user):
    return web.json({user: totals[user]})


@app.command(
    option(
        "--max-latency",
        type=float,
        default=PRODUCE_LATENCY,
        help="Add delay of (at most) n seconds between publishing.",
    ),
    option(
        "--max-messages",
        type=int,
        default=None,
        help="Send at most N messages or 0 for infinity.",
    ),
)
async def produce(self, max_latency: float, max_messages: int):
    """Produce example Withdrawal events."""
    num_countries = 5
    countries = [f"country_{i}" for i in range(num_countries)]
    country_dist = [0.9] + [0.10 / num_countries] * (num_countries - 1)
    num_users = 500
    users = [f"user_{i}" for i in range(num_users)]
    self.say("Done setting up. SENDING!")
    for i in range(max_messages) if max_messages else count():
        withdrawal = Withdrawal(
            user=random.choice(users),
            amount=random.uniform(0, 25_000),
            country=random.choices(countries, country_dist)[0],
        )
        await withdrawals_topic.send(key=withdrawal.user, value=withdrawal)
        if not i % 10_000:
            self.say(f"+SEND {i}")
        if max_latency:
            await asyncio.sleep(random.uniform(0, max_latency))


@app.command(
    option("--foo", type=float, default=1.33),
    daemon=True,
)
async def my_daemon(self, foo: float):
    """Run until Ctrl-C."""
    print("STARTING DAEMON")
    self.say(f"foo is {foo}")
    # Set up some stuff. The command goes on after this returns, until the user hits Ctrl-C or
    # a signal ends the process.


if __name__ == "__main__":
    app.main()
