"""The word count on Kafka Streams (`WordCount.java`), compiled and run where there is a JDK."""

import os
import shutil
import subprocess
from pathlib import Path

from kafka_jars import BROKER, STREAMS, jars

SOURCE = Path(__file__).with_name("WordCount.java")


class KafkaStreams:
    """The compiled word count."""

    def __init__(self, java: Path, class_path: str) -> None:
        self.java = java
        self.class_path = class_path

    @classmethod
    def compiled(cls, folder: Path) -> "KafkaStreams | None":
        """Compile it into `folder`; None where there is no compiler."""
        home = os.environ.get("JAVA_HOME")
        javac = home and shutil.which("javac", path=Path(home) / "bin") or shutil.which("javac")
        if not javac:
            return None
        needs = {
            path.name: path
            for path in jars(STREAMS, label="Kafka Streams 4.3.1")
            + jars(BROKER, label="Apache Kafka 4.3.1")
        }
        class_path = os.pathsep.join([str(folder), *map(str, needs.values())])
        subprocess.run([javac, "-d", folder, "-cp", class_path, SOURCE], check=True)
        # A Java older than the compiler would refuse what it made: take its own.
        return cls(Path(javac).resolve().with_name("java"), class_path)

    def run(
        self, bootstrap: str, name: str, topic: str, words: int, guarantee: str, partitions: int
    ) -> tuple[float, float]:
        """Seconds and seconds of CPU, from the first post to the last word counted."""
        state = Path(self.class_path.partition(os.pathsep)[0]) / "state" / name
        done = subprocess.run(
            [self.java, "-Xmx1g", "-cp", self.class_path,
             "-Dorg.slf4j.simpleLogger.defaultLogLevel=error", "WordCount", bootstrap, name,
             topic, str(words), guarantee, state, str(partitions)],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"Kafka Streams: {done.stderr[-2000:]}")
        shutil.rmtree(state)
        took_s, cpu_s = map(float, done.stdout.split())
        return took_s, cpu_s
