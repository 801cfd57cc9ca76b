"""What is sent by chance or out of order may come twice after crashes; it is never missing."""

from collections import Counter
from pathlib import Path

from chaos_kafka import KafkaContent
from chaos_kafka_kills import SETTINGS
from chaos_tree import Tree, eventually, instance, kill
from confluent_kafka import Producer

APP = Path(__file__).with_name("kafka_loose_app.py")
EVENTS = 1500
KILLS = 12


def counted(made: Tree) -> Counter[str]:
    """What the table says, over all partitions."""
    content = KafkaContent(made)
    try:
        found: Counter[str] = Counter()
        for (_, key), count in content.table("seen", 4).items():
            found[key] += count
        return found
    finally:
        content.close()


def kill_one(made: Tree, number: int) -> bool:
    """Kill one of the agents' processes; False where there is none."""
    pids = made.processes()
    agents = sorted(name for name in pids if "#" in name and not name.startswith("app"))
    return bool(agents) and kill(pids[agents[number % len(agents)]])


def test_agents_by_chance_and_with_concurrency_lose_nothing_in_crashes(kafka: str) -> None:
    wanted = {f"{how} {n}" for n in range(EVENTS) for how in ("together", "chance")}
    with instance(kafka, SETTINGS, APP) as made:
        made.start()
        producer = Producer({"bootstrap.servers": kafka, "linger.ms": 5})
        for number in range(EVENTS):
            producer.produce(f"{made.prefix}numbers", b"%d" % number)
            if number % (EVENTS // KILLS) == 0:
                producer.flush(30)
                eventually(lambda: kill_one(made, number), "an agent is there", 30.0)  # noqa: B023
        producer.flush(30)
        eventually(lambda: counted(made).keys() == wanted, "all were noted", 60.0)
        made.stop()
        found = counted(made)

    assert found.keys() == wanted
    assert min(found.values()) >= 1
