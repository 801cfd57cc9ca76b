"""`check`, and what a start would make: is all well with an app before it runs?"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

from streamd.agentproc.kafka.installation import installation_there
from streamd.app import App
from streamd.cli import output, target
from streamd.cli.imported import import_app
from streamd.cli.options import display_path, given
from streamd.cli.root import Command
from streamd.config import broker_kind
from streamd.errors import BrokerError, ConfigError, StreamdError, UsageError
from streamd.secrets import mask
from streamd.wire import Hello

LOOPBACK = ("127.", "::1", "localhost", "unix:")
LOW_DISK_BYTES = 1024**3


@dataclass(frozen=True)
class Finding:
    """One line of `check`."""

    level: str  # "ok" | "warn" | "fail"
    subject: str
    text: str
    remedy: str | None = None
    exit_code: int = 1  # where it fails


def check(strict: bool) -> int:
    """Check app, settings, groups, broker and web.

    Imports the app in this process. Exits 1 when something fails, 69 when the broker cannot be
    reached or refuses, 78 when its options cannot be used. On Kafka it goes step by step:
    name, connect, TLS, login, version, permission. Makes no topic.
    """
    return _report("check", _check(), strict=strict)


def plan() -> int:
    """What a start would make: nothing is started or made; the exit code, as of `check`."""
    app, origin = import_app(given())
    hello = app.hello(origin, alone=False)
    return _report("plan", [*_check_groups(hello), *_check_broker(app, hello)], strict=False)


def _report(schema: str, found: Iterable[Finding], *, strict: bool) -> int:
    findings = list(found)
    failed = sum(finding.level == "fail" for finding in findings)
    warned = sum(finding.level == "warn" for finding in findings)
    if given().json:
        output.say_json(
            {
                "schema": f"streamd.{schema}/1",
                "failed": failed,
                "warnings": warned,
                "findings": msgspec.to_builtins(findings),
            }
        )
    else:
        for finding in findings:
            level = output.colored(f"{finding.level:<5}", finding.level)
            output.say(f"{level} {finding.subject:<11} {finding.text}")
            if finding.remedy and finding.level != "ok":
                output.say(f"      {'':<11} Try: {finding.remedy}")
        summary = [f"{failed} failed"] if failed else []
        summary += [output.plural(warned, "warning")] if warned else []
        output.say(", ".join(summary) or "All is well.")
    codes = [finding.exit_code for finding in findings if finding.level == "fail"]
    return max(codes, default=int(strict and warned > 0))


def _check() -> Iterator[Finding]:
    try:
        app, origin = import_app(given())
        hello = app.hello(origin, alone=False)
    except UsageError:
        raise
    except StreamdError as error:
        text = "\n".join([str(error), *(f"{'':<18}{line}" for line in error.seen)])
        yield Finding("fail", "app", text, error.remedy)
        return
    yield _check_app(hello)
    yield _check_settings(hello)
    yield from _check_groups(hello)
    yield from (Finding("warn", "app", warning) for warning in hello.warnings)
    yield from (Finding("warn", "settings", text) for text in app.settings.warnings)
    yield from _check_broker(app, hello)
    yield _check_web(hello.settings)


def _check_app(hello: Hello) -> Finding:
    agents = sum(len(group.agents) for group in hello.groups)
    counts = [output.plural(agents, "agent"), output.plural(len(hello.tables), "table")]
    for kind in ("task", "timer", "crontab"):
        if number := sum(timer.kind == kind for timer in hello.timers):
            counts.append(output.plural(number, kind))
    if hello.routes:
        counts.append(output.plural(len(hello.routes), "page"))
    return Finding("ok", "app", f"{hello.origin}, id {hello.app_id}, {', '.join(counts)}")


def _check_settings(hello: Hello) -> Finding:
    changed = [each.name for each in hello.settings_shown if each.origin != "default"]
    file = target.settings_file(given())
    where = f"{display_path(file)}; " if file else ""
    names = f" ({', '.join(changed)})" if changed else ""
    return Finding("ok", "settings", f"{where}{len(changed)} changed from default{names}")


def _check_groups(hello: Hello) -> Iterator[Finding]:
    for group in hello.groups:
        parts = [", ".join(agent.label for agent in group.agents)]
        if group.tables:
            parts.append(f"tables {', '.join(group.tables)}")
        if group.processes > 1:
            parts.append(output.plural(group.processes, "process"))
        if group.auto:
            parts.append("more processes when it is behind")
        if group.why:
            parts.append(group.why)
        yield Finding("ok", "group", f"{group.name}: {'; '.join(filter(None, parts))}")


def _check_broker(app: App, hello: Hello) -> Iterator[Finding]:
    settings = hello.settings
    broker = str(settings["broker"])
    if broker_kind(broker) == "kafka":
        yield from _check_kafka(app, hello)
        return
    if broker_kind(broker) != "embedded":
        yield Finding("ok", "broker", mask(broker))
        return
    datadir = Path(settings["datadir"])
    there = datadir
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    text = f"embedded, {display_path(datadir)}, {output.size(free)} free"
    if free < LOW_DISK_BYTES:
        yield Finding("warn", "broker", text, "free some space, or another --datadir")
    else:
        yield Finding("ok", "broker", text)


def _check_kafka(app: App, hello: Hello) -> Iterator[Finding]:
    from streamd.agentproc.kafka import outside  # noqa: PLC0415 - 0.1 s, only for Kafka

    broker = mask(str(hello.settings["broker"]))
    try:
        for walked in outside.way_there(app):
            if walked.exit_code:
                text = f"{broker}: {walked.name} failed: {walked.text}"
                yield Finding("fail", "broker", text, walked.remedy, walked.exit_code)
                return
            yield Finding("ok", walked.name, walked.text)
        survey = outside.topics_of(app, hello)
    except (BrokerError, ConfigError) as error:
        step = "permission failed: " if "authorization failed" in str(error) else ""
        text = f"{broker}: {step}{error}"
        yield Finding("fail", "broker", text, error.remedy, error.exit_code)
        return
    there = output.plural(len(survey.found), "topic")
    yield Finding("ok", "broker", f"{broker}, {there} of the app there")
    yield _members(hello)
    for each in outside.permissions_of(app, hello, survey):
        level = "fail" if each.exit_code else "ok"
        yield Finding(level, each.name, each.text, each.remedy, each.exit_code)
    for topic in survey.missing:
        yield Finding("ok", "topic", f"{topic.name} would be made: {topic.shape}")
    for name, how in survey.different.items():
        yield Finding(
            "warn", "topic", f"{name}: {'; '.join(how)}",
            "change it with Kafka's kafka-configs, or what the app declares",
        )  # fmt: skip
    for refused in survey.refused:
        yield Finding("fail", "topic", str(refused), refused.remedy)


def _members(hello: Hello) -> Finding:
    """What the processes are called on the cluster."""
    id, datadir = hello.app_id, Path(hello.settings["datadir"])
    names = [f"{id}.{group.name}" for group in hello.groups if group.agents]
    known = installation_there(datadir)
    who = f"installation {known}" if known else "an installation made at the first start"
    groups = f"consumer groups {', '.join(names)}" if names else "no consumer groups"
    guarantee = hello.settings["processing_guarantee"]
    return Finding("ok", "broker", f"{groups}; {who}; {guarantee}")


def _check_web(settings: dict[str, Any]) -> Finding:
    if not settings["web_enabled"]:
        return Finding("ok", "web", "off")
    bind, port = str(settings["web_bind"]), settings["web_port"]
    address = bind if bind.startswith("unix:") else f"http://{bind}:{port}"
    if not bind.startswith(LOOPBACK) and not settings.get("web_token"):
        return Finding(
            "warn",
            "web",
            f"{address} can be reached from outside, and there is no web_token: "
            "the page is read-only and shows no values",
            "STREAMD_WEB_TOKEN, or web_token_file in streamd.toml",
        )
    return Finding("ok", "web", address)


check_command = Command(
    "check",
    callback=check,
    help=check.__doc__,
    params=[click.Option(["--strict"], is_flag=True, help="Warnings fail too (for CI).")],
)
