"""Jars from Maven Central, kept in the user's cache folder.

A set of jars is made in a folder beside its place, each jar read through once, and moved there
when it is whole, with a list of sizes and hashes. So what is in its place is complete unless
it was damaged later, which the hashes show: then it is fetched anew. One process fetches at a
time; the others wait for it.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from jgo.maven import Artifact, MavenContext

from streamd.errors import StreamdError

BROKER = "org.apache.kafka:kafka_2.13:4.3.1+org.slf4j:slf4j-simple:1.7.36"
STREAMS = "org.apache.kafka:kafka-streams:4.3.1+org.slf4j:slf4j-simple:1.7.36"
TRIES = 3
AT_ONCE = 6


def jars(coordinates: str, *, label: str) -> list[Path]:
    """The jars of these coordinates and of all they depend on, fetched where they are not.

    Blocks until they are there; tells its progress on stderr, with `label`.

    Args:
        coordinates: `group:artifact:version`, joined by `+`.

    Raises:
        StreamdError: They cannot be fetched.
    """
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    place = cache / hashlib.sha256(coordinates.encode()).hexdigest()[:16]
    with _alone(place.with_suffix(".lock")):
        found = _whole(place)
        if found is None:
            if place.exists():
                _tell(f"{label}: the copy in the cache is damaged, it is fetched again")
                shutil.rmtree(place)
            _fetch(coordinates, place, label)
            found = _whole(place)
    if found is None:
        raise StreamdError(
            f"{place} was written and cannot be read back", remedy="check the disk"
        )
    return found


def cache_folder() -> Path:
    """Where jars are kept: `streamd/jars` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "streamd" / "jars"


def _whole(place: Path) -> list[Path] | None:
    """The jars, in the order of the class path, if all are as they were written."""
    try:
        listed: dict[str, str] = json.loads((place / "jars.json").read_text())
        if all(_hash(place / name) == digest for name, digest in listed.items()):
            return [place / name for name in listed]
    except (OSError, ValueError):
        return None
    return None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(coordinates: str, place: Path, label: str) -> None:
    staging = place.with_suffix(".new")
    # What an ended process left there may hold half a file, which jgo takes for a whole one.
    shutil.rmtree(staging, ignore_errors=True)
    began_at = time.monotonic()
    _tell(f"{label}: asking Maven Central what it needs (once; kept in {place.parent})")
    # jgo warns of what is tried next; what fails in the end is told here.
    logging.getLogger("jgo").setLevel(logging.ERROR)
    try:
        context = MavenContext(repo_cache=staging / "repository", local_repos=[])
        wanted = _wanted(context, coordinates)
        paths = _download(wanted, label)
        for path in paths:
            path.rename(staging / path.name)
        shutil.rmtree(staging / "repository")
        listed = {path.name: _hash(staging / path.name) for path in paths}
        (staging / "jars.json").write_text(json.dumps(listed))
        staging.rename(place)
    except (OSError, RuntimeError, ValueError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise StreamdError(
            f"{label} cannot be fetched from Maven Central",
            seen=[f"{type(error).__name__}: {str(error)[:200]}"],
            remedy="check the network, or set STREAMD_TEST_KAFKA=host:port to use a broker "
            "that runs elsewhere",
        ) from error
    _tell(f"{label}: done after {time.monotonic() - began_at:.0f} s")


def _wanted(context: MavenContext, coordinates: str) -> list[Artifact]:
    named, others = context.resolver.resolve(
        [context.create_dependency(each) for each in coordinates.split("+")]
    )
    return [
        *(dependency.artifact for dependency in named),
        *(each.artifact for each in others if each.scope in ("compile", "runtime")),
    ]


def _download(wanted: list[Artifact], label: str) -> list[Path]:
    paths: dict[str, Path] = {}
    done_bytes = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = [pool.submit(_download_one, artifact) for artifact in wanted]
        try:
            for done in as_completed(waiting):
                path = done.result()
                paths[path.name] = path
                done_bytes += path.stat().st_size
                _progress(
                    f"{label}: {len(paths)} of {len(wanted)} jars, {done_bytes / 1e6:.0f} MB",
                    last=len(paths) == len(wanted),
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [paths[artifact.filename] for artifact in wanted]


def _download_one(artifact: Artifact) -> Path:
    for left in reversed(range(TRIES)):
        try:
            path = artifact.resolve()
            with zipfile.ZipFile(path) as jar:
                damaged = jar.testzip()
            if damaged is None:
                return path
            raise zipfile.BadZipFile(f"{path.name}: {damaged} is damaged")
        except (OSError, zipfile.BadZipFile) as error:
            # Half a file would pass for a whole one at the next try.
            if artifact.cached_path is not None:
                artifact.cached_path.unlink(missing_ok=True)
            if not left:
                raise OSError(f"{artifact.filename}: {error}") from error
    raise AssertionError("unreachable")


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _progress(text: str, *, last: bool) -> None:
    """One line that is written over on a terminal; elsewhere only its last state."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text}" + ("\n" if last else ""))
        sys.stderr.flush()
    elif last:
        _tell(text)
