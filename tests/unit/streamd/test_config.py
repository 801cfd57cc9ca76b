import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
import pytz
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st

from streamd import config, secrets
from streamd.config import (
    SETTINGS,
    Settings,
    bootstrap,
    find_file,
    resolve,
    settings_page,
)
from streamd.credentials import CREDENTIALS
from streamd.errors import ConfigError
from streamd.kinds import (
    BROKER,
    Refused,
    parse_bool,
    parse_broker,
    parse_duration,
    parse_size,
    show_duration,
    show_size,
)
from streamd.librdkafka import OPTIONS
from streamd.secrets import mask

ROOT = Path(__file__).parents[3]


def settled(
    app: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
    options: Mapping[str, str] | None = None,
) -> Settings:
    return resolve({"id": "proj", **(app or {})}, environ or {}, file, options or {})


def refused(**sources: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        settled(**sources)
    assert caught.value.exit_code == 78
    return caught.value


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "streamd.toml"


def test_the_nearer_source_wins(toml: Path) -> None:
    toml.write_text("# all\n\ngrace = 1\n")
    steps: list[tuple[dict[str, Any], float, str]] = [
        ({}, 30.0, "default"),
        ({"file": toml}, 1.0, "streamd.toml:3"),
        ({"app": {"grace": 2}}, 2.0, "App(grace=...)"),
        ({"environ": {"STREAMD_GRACE": "3s"}}, 3.0, "environment STREAMD_GRACE"),
        ({"options": {"grace": "4"}}, 4.0, "option --grace"),
    ]

    sources: dict[str, Any] = {}
    for source, value, origin in steps:
        sources |= source
        settings = settled(**sources)

        assert (settings.grace, settings.origin("grace")) == (value, origin)


def test_every_default_is_a_value_of_its_kind_and_plain_data() -> None:
    settings = settled()

    assert [row.name for row in settings.shown()] == [row.name for row in SETTINGS]
    msgspec.msgpack.encode(settings.plain())


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.name)
def test_what_is_shown_is_read_back(row: config.Setting[Any]) -> None:
    value = row.kind.parse(row.default)

    if value is not None and not row.app_only:
        assert row.kind.parse(row.kind.show(value)) == value
    assert row.help.rstrip("]").endswith((".", "name", "stderr", "-data"))


def test_the_page_in_the_docs_is_the_table() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()

    assert page == settings_page(), "write settings_page() into docs/settings.md"


def test_plain_values_are_seconds_bytes_and_absolute_paths() -> None:
    plain = settled({"web_max_body": "2MB", "topic_retention": "2h", "datadir": "here"}).plain()

    assert (plain["web_max_body"], plain["topic_retention"]) == (2_000_000, 7200.0)
    assert plain["datadir"] == str(Path("here").absolute())
    assert plain["timezone"] == "UTC"


def test_a_version_is_part_of_the_id_but_not_of_the_data_directory() -> None:
    settings = settled({"version": 3})

    assert (settings.id, settings.name) == ("proj-v3", "proj")
    assert settings.plain()["id"] == "proj-v3"
    assert settings.datadir == Path("proj-data")


def test_the_file_may_group_settings_and_write_them_with_dashes(toml: Path) -> None:
    toml.write_text('app = "proj"\nhang-limit = "1m"\n\n[web]\nenabled = false\nport = 7000\n')

    settings = settled(file=toml)

    assert (settings.hang_limit, settings.web_port, settings.web_enabled) == (60.0, 7000, False)
    assert settings.origin("web_port") == "streamd.toml:6"
    assert settings.origin("hang_limit") == "streamd.toml:2"
    assert config.file_value(toml, "app") == "proj"


def test_pyproject_counts_where_it_has_a_table_and_no_streamd_toml_is_there(
    tmp_path: Path,
) -> None:
    shared = tmp_path / "pyproject.toml"
    shared.write_text("[tool.other]\nx = 1\n")
    assert find_file(tmp_path) is None

    shared.write_text("[project]\nname = 'x'\n\n[tool.streamd]\nretries = 5\n")
    assert find_file(tmp_path) == shared
    settings = settled(file=shared)
    assert (settings.retries, settings.origin("retries")) == (5, "pyproject.toml:5")

    (tmp_path / "streamd.toml").write_text("")
    assert find_file(tmp_path) == tmp_path / "streamd.toml"


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"environ": {"STREAMD_WEB_PORT": "70000"}},
            "web_port is '70000' (environment STREAMD_WEB_PORT); "
            "expected a port number from 0 to 65535",
        ),
        (
            {"options": {"processing_guarantee": "exactly-once"}},
            "processing_guarantee is 'exactly-once' (option --processing-guarantee); "
            "expected one of at_least_once, exactly_once; did you mean exactly_once?",
        ),
        ({"app": {"web_prot": 1}}, "unknown setting 'web_prot' (App(web_prot=...)); "
                                   "did you mean 'web_port'?"),
        ({"app": {"retries": True}}, "retries is True (App(retries=...)); "
                                     "expected a whole number from 0"),
        ({"app": {"loglevel": "info"}}, "loglevel cannot be set in App(...): "
                                        "it must hold before the import"),
        ({"environ": {"STREAMD_ID": "x"}}, "id can be set only in App(...), "
                                           "not in environment STREAMD_ID"),
        ({"app": {"web_ssl_context": "x"}}, "web_ssl_context is set "
         "(App(web_ssl_context=...)): streamd cannot do this yet, "
         "and must not run as if it did"),
        ({"app": {"broker": "kafak://a"}}, "broker is 'kafak://a' (App(broker=...)): "
         "no broker of the kind kafak:// is known; did you mean kafka://?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_wrong_setting_is_told_with_its_place(sources: dict[str, Any], message: str) -> None:
    assert str(refused(**sources)) == message


def test_all_that_is_wrong_is_told_at_once(toml: Path) -> None:
    toml.write_text("gracee = 1\nweb_timeout = 0\n")

    error = refused(file=toml)

    assert str(error) == "unknown setting 'gracee' (streamd.toml:1); did you mean 'grace'?"
    assert len(error.seen) == 1
    assert "web_timeout is 0 (streamd.toml:2)" in error.seen[0]
    assert error.remedy is not None


def test_a_file_that_is_no_toml_or_not_there_is_told(toml: Path) -> None:
    assert "cannot be read" in str(refused(file=toml))

    toml.write_text("grace = \n")
    assert "is no TOML" in str(refused(file=toml))
    assert "line 1" in str(refused(file=toml))


def test_an_unknown_variable_is_a_warning_and_streamds_own_are_none() -> None:
    environ = {"STREAMD_GRACEE": "1", "STREAMD_WEB_PORT": "", "STREAMD_TEST_KAFKA": "a:1"}
    environ |= dict.fromkeys(config.OTHER_VARIABLES, "x")

    settings = settled(environ=environ)

    assert settings.warnings == [
        "the environment has STREAMD_GRACEE, no setting; did you mean STREAMD_GRACE?"
    ]
    assert settings.web_port == 6066


def test_settings_of_fausts_are_taken_with_a_warning() -> None:
    settings = settled({"store": "rocksdb://", "default_partitions": 4})

    assert settings.topic_partitions == 4
    assert len(settings.warnings) == 1
    assert settings.warnings[0].startswith("store (App(store=...)): ")


def test_no_setting_is_both_taken_and_without_effect() -> None:
    assert not set(Settings.table) & (set(config.NO_EFFECT) | set(config.REFUSED))


def test_a_secret_is_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("streamd.secrets._hidden", set())
    file = tmp_path / "token"
    file.write_text("s3cr3t-value\n")

    settings = settled(
        {"broker": "kafka://ann:pass@a", "web_token_file": str(file)},
    )

    shown = {row.name: row.value for row in settings.shown()}
    assert (settings.web_token, settings.origin("web_token")) == (
        "s3cr3t-value",
        f"file {file}",
    )
    assert shown["web_token"] == "***"
    assert shown["broker"] == "kafka://ann:***@a:9092"
    assert settings.plain()["broker"] == "kafka://ann:pass@a:9092"
    assert mask("it is s3cr3t-value") == "it is ***"
    assert "pass" not in str(refused(app={"broker": "kafka://ann:pass@a:x"}))
    assert Settings.web_token.option is None


def test_an_empty_token_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")

    assert "is empty" in str(refused(app={"web_token_file": tmp_path / "token"}))


def test_a_prefix_of_the_apps_own_wins_over_streamds() -> None:
    settings = settled(
        {"env_prefix": "SITE_"}, {"STREAMD_GRACE": "1", "SITE_GRACE": "2", "SITE_OTHER": "x"}
    )

    assert (settings.grace, settings.origin("grace")) == (2.0, "environment SITE_GRACE")
    assert settings.warnings == []


def test_bootstrap_knows_only_what_must_hold_before_user_code(toml: Path) -> None:
    toml.write_text('umask = "027"\ngrace = "nonsense"\n')

    settings = bootstrap({"STREAMD_LOGLEVEL": "WARNING"}, toml, {"logfile": "x.log"})

    assert (settings.umask, settings.loglevel) == (0o27, "warn")
    assert settings.logfile == Path("x.log")
    assert {row.name for row in settings.shown()} == {
        "loglevel", "logfile", "log_format", "log_max_size", "log_max_age", "log_keep",
        "workdir", "user", "group", "umask", "nofile", "nproc", "core", "nice", "env",
    }  # fmt: skip
    with pytest.raises(AttributeError, match="grace is known only once the app is imported"):
        _ = settings.grace


@pytest.mark.parametrize(
    ("given_", "canonical"),
    [
        ("embedded://", "embedded://"),
        ("memory://", "memory://"),
        ("kafka://a:9092;b:9092", "kafka://a:9092;b:9092"),
        ("kafka://a,kafka://b:1", "kafka://a:9092;b:1"),
        (["aiokafka://a", "confluent://b"], "kafka://a:9092;b:9092"),
        ("localhost:9092", "kafka://localhost:9092"),
        ("kafka://u:p@[::1]:9", "kafka://u:p@[::1]:9"),
        ("KAFKA://a/", "kafka://a:9092"),
        ("kafka+ssl://u:p@a;b", "kafka+ssl://u:p@a:9092;b:9092"),
    ],
    ids=str,
)
def test_a_broker_has_one_spelling(given_: Any, canonical: str) -> None:
    assert parse_broker(given_) == canonical
    assert parse_broker(canonical) == canonical


@pytest.mark.parametrize(
    "text",
    ["", "redis://a", "embedded:///x", "memory://;memory://", "embedded://;kafka://a",
     "kafka+ssl://a;kafka://b", "kafka+tls://a", "embedded+ssl://", "kafka://", "kafka://a:0",
     "kafka://a:x", "kafka://a/b"],
)  # fmt: skip
def test_what_is_no_broker_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        parse_broker(text)


def test_the_servers_of_a_broker_come_without_credentials() -> None:
    broker = parse_broker("kafka://u:p@a;b:1")

    assert config.broker_kind(broker) == "kafka"
    assert config.broker_servers(broker) == ["a:9092", "b:1"]
    assert config.broker_servers("embedded://") == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("5m", 300), ("2h", 7200), ("1h 30m", 5400), ("7d", 604800),
     (2, 2), (0.5, 0.5), ("30", 30), (timedelta(minutes=1), 60), ("1.5 h", 5400)],
)  # fmt: skip
def test_durations_are_read(text: Any, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "x", "5 parsecs", "-1", "nan", "inf", "1h 30", None, True]
)
def test_what_is_no_duration_is_refused(text: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("64MiB", 64 << 20), ("1MB", 10**6), ("1 kib", 1024), ("0.5KiB", 512), (7, 7), ("7", 7)],
)
def test_sizes_are_read(text: Any, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "x", "-1", "1 parsec", 1.5, True, -1])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        parse_size(text)


@given(st.integers(0, 10**10).map(lambda ms: ms / 1000))
def test_a_duration_that_is_shown_is_read_back(seconds: float) -> None:
    assert parse_duration(show_duration(seconds)) == pytest.approx(seconds, rel=1e-11)


@given(st.integers(0, 1 << 50))
def test_a_size_that_is_shown_is_read_back(size_bytes: int) -> None:
    assert parse_size(show_size(size_bytes)) == size_bytes


def test_truths_are_fausts_words() -> None:
    assert all(parse_bool(word) for word in ("1", "true", "YES", " on ", True, 1))
    assert not any(parse_bool(word) for word in ("0", "false", "No", "off", False, 0))
    for word in ("2", "maybe", ""):
        with pytest.raises(ValueError):
            parse_bool(word)


@pytest.mark.parametrize(
    "zone",
    ["Europe/Vienna", ZoneInfo("Europe/Vienna"), pytz.timezone("Europe/Vienna")],
    ids=["text", "zoneinfo", "pytz"],
)
def test_a_time_zone_is_taken_in_any_form(zone: Any) -> None:
    assert settled({"timezone": zone}).timezone == ZoneInfo("Europe/Vienna")
    assert settled({"timezone": UTC}).timezone == ZoneInfo("UTC")
    assert "timezone is 'Mars/One'" in str(refused(app={"timezone": "Mars/One"}))


def test_the_table_is_read_without_asyncio_or_a_web_framework() -> None:
    code = (
        "import sys, streamd.config;"
        "print({'asyncio', 'starlette', 'jinja2', 'click', 'psutil'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )

    assert done.stdout.strip() == "set()", done.stderr


# What TOML and Python have for values, and what a shell has.
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.binary(max_size=5) | st.datetimes() | st.timedeltas() | st.just(object()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)  # fmt: skip
texts = st.text(max_size=20).filter(bool) | st.sampled_from(
    [
        "-1",
        "nan",
        "inf",
        "1e400",
        "9" * 400,
        "0x10",
        "١٢",
        "1\n2",
        "\0",
        "${HOME}",
        "-0s",
        "1 h x",
    ]
)


@pytest.mark.parametrize("row", config.SETTINGS, ids=lambda row: row.name)
@profile(max_examples=25, deadline=None)
@given(value=anything, text=texts)
def test_whatever_a_setting_is_given_it_takes_or_tells_name_value_and_place(
    row: config.Setting[Any], value: object, text: str
) -> None:
    sources: list[tuple[str, object, dict[str, Any]]] = []
    if not row.early:
        sources.append((f"App({row.name}=...)", value, {"app": {row.name: value}}))
    if row.variable is not None:
        origin = f"environment {row.variable}"
        sources.append((origin, text, {"environ": {row.variable: text}}))
    if row.option is not None and "/" not in row.option:
        sources.append((f"option {row.option}", text, {"options": {row.name: text}}))
    for origin, given_, source in sources:
        # What one example hides would be blanked in the messages of the next.
        secrets._hidden.clear()
        try:
            settled(**source)
        except ConfigError as error:
            assert error.exit_code == 78 and error.remedy
            said = str(error)
            assert row.name in said and origin in said
            assert "\n" not in said
            if row.secret:
                assert repr(given_) not in said
            elif (
                row.kind not in (BROKER, CREDENTIALS, OPTIONS)
                and "which cannot be read" not in said
            ):
                assert repr(given_) in said
            assert "expected" in said or "): " in said or "which cannot be read" in said
            continue
        # What was taken, frames can carry.
        msgspec.msgpack.encode(settled(**source).plain())
