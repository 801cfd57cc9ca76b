"""Examples beyond the guides: the bank, which must stay exact, and what becomes of failures."""

import os
import signal
import subprocess
from functools import partial

from examples_instance import Instance, eventually, example

TRANSFERS = 20_000


def _processes(bank: Instance) -> dict[str, int]:
    _, told = bank.get("/stats/")
    return {row["name"]: row["pid"] for row in told["processes"] if row["pid"]}


def _has_done(bank: Instance, events: int) -> bool:
    return bool(bank.get("/stats/")[1]["events"] > events)


def test_no_money_is_made_or_lost_by_crashes() -> None:
    with example("bank.py") as bank:
        bank.start("start", "--foreground")
        with subprocess.Popen(
            bank.command("transfer", str(TRANSFERS), "--seed", "1"),
            cwd=bank.place, env=bank.environment,
        ) as sending:  # fmt: skip
            for name, events in (("withdraw#0", 0), ("withdraw#1", 5_000)):
                eventually(partial(_has_done, bank, events))
                os.kill(_processes(bank)[name], signal.SIGKILL)
        assert sending.returncode == 0

        right = f"sum 0, {2 * TRANSFERS} halves of transfers\n"
        eventually(lambda: bank.run("audit", code=None) == right, within_s=30)

        eventually(
            lambda: sum(row["restarts"] for row in bank.get("/stats/")[1]["processes"]) == 2
        )
        assert bank.get("/balance/account-7/")[1]["halves"] > 0
        assert bank.stop() == 0


def test_failed_orders_are_tried_again_then_dead_lettered_and_leave_nothing() -> None:
    with example("retries.py") as shop:
        shop.start("worker", "-l", "info")
        for id, amount in (("a", 4), ("b", -1), ("c", 3)):
            shop.run("send", "orders", f'{{"id": "{id}", "amount": {amount}}}')
        shop.run("send", "hints", "")
        shop.run("send", "hints", "buy")

        told = eventually(
            lambda: (told := shop.get("/orders/")[1])["given_up"] and told["hints"] and told
        )

        assert told["charged"] == {"a": 4, "c": 3}
        assert told["given_up"] == {"b": "CardRefused: order b: -1"}
        assert told["tries"] == {"a": 1, "b": 3, "c": 2}
        assert "it is skipped" in shop.text
        assert shop.stop() == 0
