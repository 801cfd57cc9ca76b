"""Becomes one node of a broker: `python kafka_node.py FOLDER JAVA CLASS_PATH PARENT FLAG...`.

It writes who it is into FOLDER/process.json before it does anything else, so whoever looks
later, also after a crash of the starter, ends this very process and no other. Then it makes the
node's storage where there is none, and becomes Java. PARENT is the pid whose end ends the node
too, 0 for none.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def main(folder: Path, java: str, class_path: str, parent: int, flags: list[str]) -> None:
    """Run the node in this process; returns only where its storage could not be made."""
    if parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
    record(folder / "process.json")
    settings = str(folder / "server.properties")
    formatted = folder / "formatted"
    if not formatted.exists():
        cluster_id = (folder.parent / "id").read_text()
        tool = ["kafka.tools.StorageTool", "format", "-g", "-t", cluster_id, "-c", settings]
        quick = ["-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        if subprocess.run([java, *quick, "-cp", class_path, *tool]).returncode:
            return
        formatted.touch()
    os.execv(java, [java, *flags, "-cp", class_path, "kafka.Kafka", settings])


def record(path: Path) -> None:
    """Write pid, start ticks and boot id, which stay when this process becomes Java."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    new = path.with_suffix(".new")
    new.write_text(
        json.dumps({"pid": os.getpid(), "start_ticks": int(stat[19]), "boot_id": boot_id})
    )
    new.rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5:])
    raise SystemExit(1)
