"""Commands that contradict each other wait, are one, or are refused, and say so."""

import asyncio
import random
import signal
from typing import Any

import pytest
from supervisor_load import COUNT, Feed, wait_counted
from supervisor_tree import Tree, eventually, tree_of

from streamd.errors import StreamdError
from streamd.link import LinkLost, connect
from streamd.wire import Command, Document

# Imported slowly, so that there is time to contradict.
SLOW = COUNT + "\nimport time\ntime.sleep(1.0)\n"


async def told(house: Tree, verb: str, **args: Any) -> list[Any]:
    """All answers to a command; the last one is the error, where it was refused."""
    link = await connect(house.folder.control_path, "master")
    answers: list[Any] = []
    try:
        async with asyncio.timeout(60):
            async for answer in link.stream(Command(verb, args)):
                assert isinstance(answer, Document)
                answers.append(answer.data)
    except StreamdError as error:
        answers.append(error)
    finally:
        link.close()
    return answers


async def wait_said(house: Tree, text: str, times: int = 1) -> None:
    await asyncio.to_thread(eventually, lambda: house.log.count(text) >= times, 20)


def test_a_stop_while_it_reloads_wins_and_who_waits_is_told() -> None:
    async def meet(house: Tree) -> tuple[list[Any], ...]:
        reload = asyncio.create_task(told(house, "reload"))
        await wait_said(house, "importing the new code")
        scale = asyncio.create_task(told(house, "scale", group="count", processes=2))
        await wait_said(house, "waits until this is done: reloading")
        stop = asyncio.create_task(told(house, "stop", mode="warm", wait=True))
        return await asyncio.gather(reload, scale, stop)

    with tree_of(SLOW) as house:
        house.run()

        reload, scale, stop = asyncio.run(meet(house))

        assert str(reload[-1]) == "proj is stopping; given up: reloading"
        assert str(scale[-1]) == "proj is stopping; given up: scaling count to 2"
        assert stop[0] == {"stopping": "warm", "already": False}
        assert isinstance(stop[-1], LinkLost)
        assert house.wait_exit() == 0
        assert "Traceback" not in house.log


def test_a_second_stop_is_one_with_the_first_and_a_cold_one_hastens_it() -> None:
    lingering = COUNT + (
        "import asyncio\n"
        "@app.task\n"
        "async def linger():\n"
        "    try:\n"
        "        await asyncio.sleep(600)\n"
        "    finally:\n"
        "        await asyncio.sleep(600)\n"
    )
    with tree_of(lingering) as house:
        house.run()

        first, second = house.ask("stop"), house.ask("stop")
        for verb, args in (
            ("restart", {"names": ["count"]}),
            ("scale", {"group": "count", "processes": 2}),
            ("reload", {}),
        ):
            with pytest.raises(StreamdError, match="proj is stopping: nothing"):
                house.ask_all(verb, **args)
        cold = house.ask("stop", mode="cold")

        assert first == {"stopping": "warm", "already": False}
        assert second == {"stopping": "warm", "already": True}
        assert cold == {"stopping": "cold", "already": True}
        assert house.wait_exit() == 3


def test_two_reloads_are_one_while_the_second_waits() -> None:
    async def meet(house: Tree) -> tuple[list[Any], ...]:
        first = asyncio.create_task(told(house, "reload"))
        await wait_said(house, "importing the new code")
        second = asyncio.create_task(told(house, "reload"))
        await wait_said(house, "waits until this is done: reloading")
        third = asyncio.create_task(told(house, "reload"))
        return await asyncio.gather(first, second, third)

    with tree_of(SLOW) as house:
        house.run()

        first, second, third = asyncio.run(meet(house))

        for answers in (first, second, third):
            assert answers[-1] == {"reloaded": "5 processes run the new code"}
        assert {"doing": "waits until this is done: reloading"} in second
        both = "another reload was asked for while this one waits: both are one"
        assert {"doing": both} in third
        assert house.log.count("importing the new code beside the old") == 2


SEED = random.randrange(2**32)


def test_whatever_is_asked_for_at_once_all_are_answered_and_no_event_is_lost() -> None:
    dice = random.Random(SEED)

    def one() -> tuple[str, dict[str, Any]]:
        each: list[tuple[str, dict[str, Any]]] = [
            ("restart", {"names": [dice.choice(["count", "split", "count#0", "web"])]}),
            ("restart", {"names": []}),
            ("scale", {"group": "count", "processes": dice.randint(1, 4)}),
            ("scale", {"group": "split", "processes": dice.randint(1, 2)}),
            ("reload", {}),
            ("status", {}),
            ("stacks", {"names": []}),
        ]
        return dice.choice(each)

    async def all_at_once(house: Tree) -> list[list[Any]]:
        asked = [told(house, verb, **args) for verb, args in (one() for _ in range(12))]
        tasks = [asyncio.create_task(each) for each in asked]
        for name in ("TTIN", "TTOU", "HUP", "TTIN"):
            house.signal(getattr(signal, f"SIG{name}"))
            await asyncio.sleep(dice.uniform(0, 0.1))
        return await asyncio.gather(*tasks)

    with tree_of(COUNT) as house:
        house.run(option_web_enabled="true")

        with Feed(house, pause_s=0.02) as feed:
            answers = asyncio.run(all_at_once(house))
            eventually(lambda: house.ask("status")["sentence"].startswith("All"), 60)

        assert len(answers) == 12
        for last in (each[-1] for each in answers):
            assert not isinstance(last, StreamdError), f"seed {SEED}: {last}"
        wait_counted(house, feed.sent)
        assert "Traceback" not in house.log, f"seed {SEED}\n{house.log[-5000:]}"
