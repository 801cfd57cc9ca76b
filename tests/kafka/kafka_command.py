"""`scripts/kafka`: a real broker by hand."""

import argparse
import os
import sys
import tempfile
import zlib
from pathlib import Path

import kafka_broker

from streamd.errors import NotPermitted, NotRunning, StreamdError


def folder_of(name: str) -> Path:
    """Where this checkout's broker of that name lies: below the temporary folder.

    Raises:
        NotPermitted: Another user owns the folder.
    """
    root = Path(tempfile.gettempdir()) / f"streamd-kafka-{os.geteuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.geteuid():
        raise NotPermitted(f"{root} belongs to another user", remedy="set TMPDIR")
    checkout = Path(__file__).resolve().parent
    return root / f"{zlib.crc32(bytes(checkout)):08x}-{name}"


def run(arguments: argparse.Namespace) -> None:
    """Do what was asked and print the url where there is one."""
    folder = folder_of(arguments.name)
    if arguments.do == "start":
        parent = os.getpid() if arguments.hold else 0
        cluster = kafka_broker.start(
            folder, nodes=arguments.nodes, port=arguments.port, parent=parent
        )
        sys.stdout.write(f"{cluster.url}\n")
        if arguments.hold:
            sys.stdout.flush()
            sys.stdin.read()
            kafka_broker.stop(folder)
    elif arguments.do == "stop":
        if not kafka_broker.stop(folder):
            sys.stderr.write("no broker was there\n")
    else:
        found = kafka_broker.Cluster.find(folder)
        if found is None or not found.is_running():
            raise NotRunning("the broker does not run", remedy="scripts/kafka start")
        sys.stdout.write(f"{found.url}\n")


def main() -> int:
    """The exit code, with what went wrong on stderr."""
    parser = argparse.ArgumentParser(
        prog="scripts/kafka",
        description="Runs Apache Kafka on this machine, for tests and trials. `start` prints "
        "its url once it answers; `stop` ends it and deletes its data.",
    )
    parser.add_argument("do", choices=("start", "stop", "url"))
    parser.add_argument("--nodes", type=int, default=1, choices=(1, 3), help="default: 1")
    parser.add_argument("--port", type=int, help="of the first node; default: a free one")
    parser.add_argument("--name", default="kafka", help="to run several")
    parser.add_argument("--hold", action="store_true", help="stop when the input ends")
    try:
        run(parser.parse_args())
    except StreamdError as error:
        for line in (f"Error: {error}", *(f"  {line}" for line in error.seen)):
            sys.stderr.write(f"{line}\n")
        if error.remedy:
            sys.stderr.write(f"Try: {error.remedy}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
