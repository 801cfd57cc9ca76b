"""The brokers that tests ask for, each started when the first test needs it."""

import os
from collections.abc import Iterator

import kafka_broker
import pytest
from kafka_broker import Cluster

DOWNLOAD_S = 300


@pytest.fixture(scope="session")
def kafka(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """`host:port` of a broker that all tests share: STREAMD_TEST_KAFKA, else one of our own.

    Topics and groups there need names of their own; nobody may harm the broker.
    """
    if given := os.environ.get("STREAMD_TEST_KAFKA"):
        yield given
        return
    cluster = _start(request, tmp_path_factory, 1)
    yield cluster.bootstrap
    cluster.remove()


@pytest.fixture(scope="module")
def kafka_node(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A broker of one node that the tests of one module may kill, stop and start."""
    cluster = _start(request, tmp_path_factory, 1)
    yield cluster
    cluster.remove()


@pytest.fixture(scope="module")
def kafka_nodes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A broker of three nodes that the tests of one module may kill, stop and start."""
    cluster = _start(request, tmp_path_factory, 3)
    yield cluster
    cluster.remove()


def _start(
    request: pytest.FixtureRequest, folders: pytest.TempPathFactory, nodes: int
) -> Cluster:
    folder = folders.mktemp("kafka") / "cluster"
    capture = request.config.pluginmanager.getplugin("capturemanager")
    # A download of 45 MB without a word looks like a test that hangs.
    with capture.global_and_fixture_disabled():
        return kafka_broker.start(folder, nodes=nodes, parent=os.getpid())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the time that the first one may need to download the broker."""
    for item in items:
        if item.path.parent.name == "kafka" and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(DOWNLOAD_S))
