"""Transfers between accounts: whatever crashes, no money is made or lost.

    streamd start -A examples/bank.py
    streamd -A examples/bank.py transfer 10000
    streamd -A examples/bank.py audit
    streamd kill -A examples/bank.py        # and start it again, and audit again

A transfer has two halves. The first takes the money from the source and sends the second to
where the target's balance is; both halves' effects are in checkpoints, each exactly once.
"""

import random

from streamd import App, Record
from streamd.cli import argument, option

ACCOUNTS = [f"account-{number}" for number in range(100)]

app = App("bank", topic_partitions=4)


class Transfer(Record):
    source: str
    target: str
    amount: int


transfers_topic = app.topic("transfers", key_type=str, value_type=Transfer)
balances = app.Table("balances", default=int, help="Money of each account.")
transfer_counts = app.Table("transfer_counts", default=int, help="Halves done, by account.")


@app.agent(transfers_topic, processes=2)
async def withdraw(transfers):
    """The first half, keyed by source."""
    async for transfer in transfers:
        balances[transfer.source] -= transfer.amount
        transfer_counts[transfer.source] += 1
        await deposit.send(key=transfer.target, value=transfer)


@app.agent(key_type=str, value_type=Transfer, processes=2)
async def deposit(transfers):
    """The second half, keyed by target."""
    async for transfer in transfers:
        balances[transfer.target] += transfer.amount
        transfer_counts[transfer.target] += 1


@app.page("/balance/{account}/")
@app.table_route(table=balances, match_info="account")
async def get_balance(web, request, account):
    """The balance of an account and how many halves of transfers made it."""
    return web.json({"balance": balances[account], "halves": transfer_counts[account]})


@app.command(
    argument("count", type=int),
    option("--seed", type=int, default=None, help="Make the same transfers each time."),
)
async def transfer(self, count: int, seed: int | None):
    """Make random transfers."""
    chance = random.Random(seed)
    for _ in range(count):
        source, target = chance.sample(ACCOUNTS, 2)
        made = Transfer(source=source, target=target, amount=chance.randint(1, 100))
        await transfers_topic.send(key=source, value=made)
    self.say(f"{count} transfers are on their way")


@app.command()
async def audit(self):
    """Add up all balances: 0 once every transfer is through."""
    sums = [await balances.lookup(account) for account in ACCOUNTS]
    halves = [await transfer_counts.lookup(account) for account in ACCOUNTS]
    self.say(f"sum {sum(sums)}, {sum(halves)} halves of transfers")
    return 0 if sum(sums) == 0 and sum(halves) % 2 == 0 else 1
