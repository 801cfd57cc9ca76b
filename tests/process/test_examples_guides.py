"""The guides' examples, each as its own text says to run it."""

import json
import signal
import subprocess
import sys
import time
from datetime import datetime
from zoneinfo import ZoneInfo

from examples_instance import EXAMPLES, Instance, eventually, example


def test_words_are_counted_and_both_forms_of_route_find_them() -> None:
    with example("word_count.py") as words:
        words.start("worker", "-l", "info")
        words.run("send", "posts", "the cat and the dog")

        eventually(lambda: words.get("/count/the/") == (200, {"the": 2}))

        assert words.get("/count/?word=cat") == (200, {"cat": 1})
        assert words.get("/count/?word=nobody") == (200, {"nobody": 0})
        assert words.get("/count/")[0] == 400
        assert words.stop() == 0


def test_counts_outlast_the_change_from_worker_to_start() -> None:
    with example("word_count.py") as words:
        words.start("worker")
        words.run("send", "posts", "one two two")
        eventually(lambda: words.get("/count/two/") == (200, {"two": 2}))
        assert words.stop(signal.SIGINT) == 0

        words.start("start", "--foreground")
        words.run("send", "posts", "two three")

        eventually(lambda: words.get("/count/two/") == (200, {"two": 3}))
        assert words.get("/count/one/") == (200, {"one": 1})
        assert words.stop() == 0


def test_tasks_run_at_the_start_and_timers_each_interval() -> None:
    with example("tasks_timers_cron.py") as clock:
        clock.start("worker", "-l", "info")

        eventually(lambda: clock.text.count("WAKE UP\n") >= 2)

        assert clock.text.count("APP STARTED") == 1
        assert clock.text.index("APP STARTED") < clock.text.index("WAKE UP")
        assert clock.stop() == 0


def test_cron_jobs_are_due_at_their_times_in_their_zones() -> None:
    with example("tasks_timers_cron.py") as clock:
        told = json.loads(clock.run("cron", "--json"))

    rows = {row["name"]: row for row in told["cron"]}
    for name, zone, hour in (
        ("every_day_at_8_pm", "UTC", 20),
        ("every_day_at_8_pm_pacific", "US/Pacific", 20),
        ("every_night_in_vienna", "Europe/Vienna", 2),
    ):
        due = datetime.fromisoformat(rows[name]["next"][0])
        assert due.astimezone(ZoneInfo(zone)).hour == hour
        assert 0 < due.timestamp() - time.time() <= 25 * 3600 + 1
    assert rows["every_day_at_8_pm_pacific"]["on_leader"]


def test_a_page_counts_in_the_memory_of_its_process() -> None:
    with example("counting_page.py") as page:
        page.start("worker", "-l", "info")

        counts = [page.get("/count/")[1]["count"] for _ in range(3)]

        assert counts == [1, 2, 3]
        assert page.stop() == 0
        page.start("worker")
        assert page.get("/count/") == (200, {"count": 1})


def test_a_view_class_answers_each_verb() -> None:
    with example("counter_view.py") as view:
        view.start("start", "--foreground")

        answers = [
            view.get("/counter/"),
            view.get("/counter/?n=3", "POST"),
            view.get("/counter/?n=4", "POST"),
            view.get("/counter/", "DELETE"),
            view.get("/counter/"),
        ]

        assert answers == [(200, {"count": count}) for count in (0, 3, 7, 0, 0)]
        assert view.get("/counter/", "PUT")[0] == 405


def _script(simple: Instance, *words: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / "simple.py"), *words]


def test_a_script_that_calls_main_is_the_command_line() -> None:
    with example("simple.py") as simple:
        done = subprocess.run(
            _script(simple, "--help"), cwd=simple.place, env=simple.environment,
            capture_output=True, check=True, timeout=30,
        )  # fmt: skip

    text = done.stdout.decode()
    assert "worker" in text and "produce" in text and "my-daemon" in text


def test_simple_worker_takes_what_the_produce_command_sends() -> None:
    with example("simple.py") as simple:
        simple.spawn(_script(simple, "worker", "-l", "info", "-p", "0"))
        simple.wait_ready()
        said = subprocess.run(
            _script(simple, "produce", "--max-latency", "0", "--max-messages", "500"),
            cwd=simple.place, env=simple.environment, capture_output=True, check=True,
            timeout=60,
        ).stdout.decode()  # fmt: skip

        def events() -> bool:
            _, told = simple.get("/stats/")
            return bool(told["events"] == 500 and told["behind"] == 0)

        eventually(events)

        assert "SENDING" in said and "+SEND 0" in said
        assert sum(simple.get(f"/total/user_{i}/")[1][f"user_{i}"] for i in range(50)) > 0
        assert simple.stop() == 0


def test_produce_shows_its_options_and_refuses_wrong_ones() -> None:
    with example("simple.py") as simple:
        shown = simple.run("produce", "--help")

        assert "--max-latency" in shown and "--max-messages" in shown
        simple.run("produce", "--max-messages", "many", code=2)


def test_a_daemon_command_stays_until_ctrl_c() -> None:
    with example("simple.py") as simple:
        daemon = simple.spawn(_script(simple, "my-daemon", "--foo", "2.5"))
        eventually(lambda: "foo is 2.5" in simple.text)

        assert "STARTING DAEMON" in simple.text
        assert daemon.poll() is None
        assert simple.stop(signal.SIGINT) == 0
