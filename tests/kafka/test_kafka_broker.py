"""The broker of the tests: it is real, it is found again, and it ends when it should."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import kafka_broker
import pytest
from confluent_kafka import Consumer
from confluent_kafka.admin import AdminClient
from kafka_broker import Cluster
from kafka_clients import make_topic, read, unique, write

from streamd.errors import Busy

COMMAND = [sys.executable, str(Path(__file__).with_name("kafka_command.py"))]
ELSEWHERE = "STREAMD_TEST_KAFKA" in os.environ
own = pytest.mark.skipif(ELSEWHERE, reason="needs its own Kafka")


def test_what_was_written_is_read_and_its_group_is_described(kafka: str) -> None:
    topic, group = make_topic(kafka, partitions=2), unique("group")
    values = [b"%d" % n for n in range(100)]
    write(kafka, topic, values)
    consumer = Consumer(
        {
            "bootstrap.servers": kafka,
            "group.id": group,
            "client.id": "http://127.0.0.1:6066#agent/0",
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe([topic])

    got = read(consumer, len(values))
    admin = AdminClient({"bootstrap.servers": kafka})
    described = admin.describe_consumer_groups([group])[group].result(30)
    consumer.close()

    assert sorted(got) == sorted(values)
    [member] = described.members
    assert member.client_id == "http://127.0.0.1:6066#agent/0"
    assert {(tp.topic, tp.partition) for tp in member.assignment.topic_partitions} == {
        (topic, 0),
        (topic, 1),
    }


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=200)


@own
def test_the_command_starts_once_says_the_url_and_ends_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    first = command("start")
    again = command("start")
    found = command("url")
    other = command("start", "--nodes", "3")
    [folder] = (path for path in tmp_path.glob("streamd-kafka-*/*") if path.is_dir())
    cluster = Cluster.find(folder)
    stopped = command("stop")

    assert cluster is not None
    assert first.stdout.strip() == cluster.url, first.stderr
    assert again.stdout == found.stdout == first.stdout
    assert other.returncode == 75
    assert "is there, not one of 3" in other.stderr
    assert stopped.returncode == 0
    assert not cluster.nodes[0].is_alive()
    assert not folder.exists()
    assert command("url").returncode == 3


@own
def test_a_broker_goes_on_with_its_data_and_port_after_a_crash(kafka_node: Cluster) -> None:
    topic = make_topic(kafka_node.bootstrap)
    write(kafka_node.bootstrap, topic, [b"before"])
    [node] = kafka_node.nodes
    before = node.identity

    node.kill()
    assert not kafka_node.is_running()
    again = kafka_broker.start(kafka_node.folder, parent=os.getpid())

    assert again.nodes[0].identity != before
    write(again.bootstrap, topic, [b"after"])
    consumer = Consumer(
        {
            "bootstrap.servers": again.bootstrap,
            "group.id": unique("group"),
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe([topic])
    assert read(consumer, 2) == [b"before", b"after"]
    consumer.close()
    again.kill()


@own
def test_a_stop_spares_a_process_that_has_the_pid_of_a_node_that_ended(tmp_path: Path) -> None:
    cluster = Cluster.make(tmp_path / "cluster")
    record = cluster.nodes[0].folder / "process.json"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        record.write_text(f'{{"pid": {other.pid}, "start_ticks": 1, "boot_id": "{boot_id}"}}')

        kafka_broker.stop(cluster.folder)

        assert other.poll() is None
        assert not cluster.folder.exists()
        other.kill()


@own
def test_a_broker_ends_with_the_process_that_it_was_started_for(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    script = (
        "import os, sys, kafka_broker\n"
        "from pathlib import Path\n"
        "kafka_broker.start(Path(sys.argv[1]), parent=os.getpid())\n"
        "print('up', flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as owner:  # fmt: skip
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        cluster = Cluster.find(folder)
        assert cluster is not None
        identity = cluster.nodes[0].identity
        assert identity is not None
        assert identity.is_alive()
        watch = os.pidfd_open(identity.pid)

        owner.send_signal(signal.SIGKILL)
        signalled = kafka_broker.wait_ended(watch, deadline_s=30)

    os.close(watch)
    assert signalled
    assert not cluster.is_running()


@own
def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        with pytest.raises(Busy, match=f"port {port} of 127.0.0.1 is taken"):
            kafka_broker.start(tmp_path / "cluster", port=port)

    assert not (tmp_path / "cluster").exists()


@own
def test_three_nodes_go_on_without_the_one_that_died(kafka_nodes: Cluster) -> None:
    topic = make_topic(kafka_nodes.bootstrap, partitions=3, copies=3)
    write(kafka_nodes.bootstrap, topic, [b"a", b"b", b"c"])

    kafka_nodes.nodes[0].kill()
    write(kafka_nodes.bootstrap, topic, [b"d", b"e", b"f"])
    kafka_nodes.nodes[0].start(parent=os.getpid())
    kafka_nodes.wait_ready()

    consumer = Consumer(
        {
            "bootstrap.servers": kafka_nodes.bootstrap,
            "group.id": unique("group"),
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe([topic])
    assert sorted(read(consumer, 6)) == [b"a", b"b", b"c", b"d", b"e", b"f"]
    consumer.close()
