"""Every setting has an effect: the place that goes by it, and the test that would notice."""

import re
from pathlib import Path

import pytest

from streamd.config import Settings

ROOT = Path(__file__).parents[3]

OPTIONS = "test_a_setting_is_an_option_of_kafkas_client"
KAFKA = ""  # tests/kafka has it, with a real broker

# Setting -> the file that goes by it, what stands there, and the test of its effect.
EFFECTS = {
    "id": ("streamd/app.py", "return self.settings.id", "test_flow_counts"),
    "version": (
        "streamd/config.py",
        'values["id"] = f"{values[\'id\']}-v',
        "test_a_version_is_part_of_the_id_but_not_of_the_data_directory",
    ),
    "autodiscover": (
        "streamd/app.py",
        "self.settings.autodiscover",
        "test_autodiscover_imports_every_module_of_the_package_but_tests",
    ),
    "app_origin": (
        "streamd/app.py",
        "self.settings.app_origin",
        "test_autodiscover_imports_every_module_of_the_package_but_tests",
    ),
    "env_prefix": (
        "streamd/config.py",
        'app_keywords.get("env_prefix")',
        "test_a_prefix_of_the_apps_own_wins_over_streamds",
    ),
    "debug": (
        "agentproc/engine.py",
        "settings.debug",
        "test_an_agents_slip_is_told_with_debug_alone",
    ),
    "timezone": (
        "streamd/app.py",
        "self.settings.timezone",
        "test_a_cron_job_without_a_zone_goes_by_the_setting",
    ),
    "broker": (
        "agentproc/process.py",
        "broker_kind(settings.broker)",
        "test_what_is_no_broker_is_refused",
    ),
    "datadir": (
        "supervisor/settings.py",
        'given["datadir"]',
        "test_a_second_worker_needs_a_data_directory_and_a_port_of_its_own",
    ),
    "processing_guarantee": ("agentproc/broker/kafka.py", "processing_guarantee ==", KAFKA),
    "checkpoint_interval": (
        "agentproc/engine.py",
        "settings.checkpoint_interval",
        "test_so_much_time_makes_a_checkpoint_due",
    ),
    "checkpoint_events": (
        "agentproc/engine.py",
        "settings.checkpoint_events",
        "test_so_many_events_make_a_checkpoint_due",
    ),
    "on_error": (
        "agentproc/trials.py",
        "settings.on_error",
        "test_who_asks_an_agent_that_gives_up_is_told",
    ),
    "retries": (
        "agentproc/trials.py",
        "settings.retries",
        "test_after_its_retries_an_event_is_dead_lettered_as_it_came",
    ),
    "retry_backoff": (
        "agentproc/trials.py",
        "settings.retry_backoff",
        "test_retries_wait_longer_and_longer",
    ),
    "reply_timeout": (
        "streamd/agents.py",
        "settings.reply_timeout",
        "test_an_ask_that_is_not_answered_times_out",
    ),
    "key_serializer": (
        "streamd/app.py",
        "settings.key_serializer",
        "test_topics_that_name_none_have_the_usual_partitions_and_codecs",
    ),
    "value_serializer": (
        "streamd/app.py",
        "settings.value_serializer",
        "test_topics_that_name_none_have_the_usual_partitions_and_codecs",
    ),
    "topic_partitions": (
        "streamd/topics.py",
        "settings.topic_partitions",
        "test_topics_that_name_none_have_the_usual_partitions_and_codecs",
    ),
    "topic_replication_factor": (
        "agentproc/kafka/declaring.py",
        "settings.topic_replication_factor",
        KAFKA,
    ),
    "topic_allow_declare": (
        "agentproc/broker/kafka.py",
        "settings.topic_allow_declare",
        "test_nothing_is_made_where_the_app_may_not_declare",
    ),
    "topic_retention": (
        "supervisor/fleet.py",
        'settings["topic_retention"]',
        "test_what_is_kept_for_ever_is",
    ),
    "consumer_auto_offset_reset": (
        "streamd/topics.py",
        "settings.consumer_auto_offset_reset",
        "test_an_agent_without_a_position_begins_where_it_is_told",
    ),
    "broker_session_timeout": (
        "agentproc/kafka/options.py",
        "settings.broker_session_timeout",
        KAFKA,
    ),
    "broker_heartbeat_interval": (
        "agentproc/kafka/options.py",
        "settings.broker_heartbeat_interval",
        OPTIONS,
    ),
    "broker_max_poll_interval": (
        "agentproc/kafka/options.py",
        "settings.broker_max_poll_interval",
        OPTIONS,
    ),
    "broker_request_timeout": (
        "agentproc/kafka/options.py",
        "settings.broker_request_timeout",
        OPTIONS,
    ),
    "broker_client_id": ("agentproc/kafka/options.py", "settings.broker_client_id", OPTIONS),
    "broker_check_crcs": ("agentproc/kafka/options.py", "settings.broker_check_crcs", OPTIONS),
    "consumer_max_fetch_size": (
        "agentproc/kafka/options.py",
        "settings.consumer_max_fetch_size",
        OPTIONS,
    ),
    "producer_compression_type": (
        "agentproc/kafka/options.py",
        "settings.producer_compression_type",
        OPTIONS,
    ),
    "producer_linger": ("agentproc/kafka/options.py", "settings.producer_linger", OPTIONS),
    "producer_max_batch_size": (
        "agentproc/kafka/options.py",
        "settings.producer_max_batch_size",
        OPTIONS,
    ),
    "producer_request_timeout": (
        "agentproc/kafka/options.py",
        "settings.producer_request_timeout",
        OPTIONS,
    ),
    "broker_options": ("agentproc/kafka/options.py", "settings.broker_options", OPTIONS),
    "broker_consumer_options": (
        "agentproc/kafka/options.py",
        "settings.broker_consumer_options",
        OPTIONS,
    ),
    "broker_producer_options": (
        "agentproc/kafka/options.py",
        "settings.broker_producer_options",
        OPTIONS,
    ),
    "broker_credentials": (
        "agentproc/kafka/options.py",
        "settings.broker_credentials",
        "test_however_it_is_said_librdkafka_is_told_the_same",
    ),
    "table_standby_replicas": (
        "agentproc/kafka/session.py",
        "settings.table_standby_replicas",
        "test_a_host_that_dies_is_followed_by_the_other_one_and_nothing_is_lost_or_doubled",
    ),
    "broker_group_protocol": (
        "agentproc/kafka/session.py",
        "settings.broker_group_protocol",
        "test_hosts_share_and_give_back_by_the_protocol_in_which_the_cluster_assigns",
    ),
    "grace": (
        "supervisor/settings.py",
        'given["grace"]',
        "test_a_process_that_hangs_while_it_stops_does_not_cost_the_whole_grace",
    ),
    "hang_limit": (
        "supervisor/settings.py",
        'given["hang_limit"]',
        "test_a_hang_is_seen_in_time_and_named_by_function_file_and_line",
    ),
    "start_limit": (
        "supervisor/settings.py",
        'given["start_limit"]',
        "test_a_process_that_blocks_before_it_is_ready_is_seen_too",
    ),
    "strategy": (
        "supervisor/settings.py",
        'given["strategy"]',
        "test_strategies_restart_exactly_these_in_order",
    ),
    "fatal_retry": (
        "supervisor/settings.py",
        'given["fatal_retry"]',
        "test_what_was_given_up_shows_its_last_lines_and_is_tried_once_more",
    ),
    "strays": (
        "supervisor/settings.py",
        'given["strays"]',
        "test_what_a_process_that_ended_left_behind_is_ended",
    ),
    "max_memory": (
        "supervisor/settings.py",
        'given["max_memory"]',
        "test_a_fresh_process_that_is_over_the_limit_is_not_replaced_again_and_again",
    ),
    "memory_check": (
        "supervisor/settings.py",
        'given["memory_check"]',
        "test_a_process_that_grows_is_drained_and_replaced_one_at_a_time",
    ),
    "web_enabled": (
        "supervisor/settings.py",
        'given["web_enabled"]',
        "test_the_status_says_all_that_the_seam_promises_in_time",
    ),
    "web_bind": (
        "supervisor/settings.py",
        'given["web_bind"]',
        "test_an_exposed_port_may_be_called_by_address_but_not_by_any_name",
    ),
    "web_port": (
        "supervisor/settings.py",
        'given["web_port"]',
        "test_a_taken_port_is_told_with_ways_out",
    ),
    "web_host": (
        "webgw/options.py",
        'given.get("web_host"',
        "test_web_host_is_a_name_that_a_request_may_have",
    ),
    "web_hosts": ("webgw/options.py", 'given.get("web_hosts"', "test_who_may_name_the_port"),
    "web_token": (
        "webgw/options.py",
        'given.get("web_token"',
        "test_an_exposed_port_with_a_token_shows_values_to_who_has_it",
    ),
    "web_token_file": (
        "streamd/config.py",
        'values["web_token_file"]',
        "test_an_empty_token_file_is_refused",
    ),
    "web_max_body": ("webgw/options.py", '"web_max_body"', "test_a_body_has_a_limit"),
    "web_access_log": (
        "webgw/options.py",
        '"web_access_log"',
        "test_requests_are_logged_once_where_that_is_asked_for",
    ),
    "web_timeout": (
        "webgw/options.py",
        '"web_timeout"',
        "test_a_page_that_takes_too_long_is_504",
    ),
    "loglevel": (
        "agentproc/zygote.py",
        "settings.loglevel",
        "test_log_lines_of_two_chatty_processes_are_whole",
    ),
    "logfile": (
        "streamd/cli/launch.py",
        "early.logfile",
        "test_log_lines_of_two_chatty_processes_are_whole",
    ),
    "log_format": (
        "streamd/cli/launch.py",
        "early.log_format",
        "test_json_lines_hold_every_field",
    ),
    "log_max_size": (
        "streamd/cli/launch.py",
        "early.log_max_size",
        "test_a_file_is_exchanged_before_it_gets_too_large_and_so_many_are_kept",
    ),
    "log_max_age": (
        "streamd/cli/launch.py",
        "early.log_max_age",
        "test_age_is_that_of_the_first_line_also_over_a_restart",
    ),
    "log_keep": (
        "streamd/cli/launch.py",
        "early.log_keep",
        "test_fewer_to_keep_than_before_removes_the_others",
    ),
    "workdir": (
        "streamd/cli/launch.py",
        "early.workdir",
        "test_limits_variables_and_the_nice_value_hold_before_user_code",
    ),
    "user": (
        "supervisor/limits.py",
        "spec.user",
        "test_the_rights_of_root_are_given_up_before_user_code",
    ),
    "group": (
        "supervisor/limits.py",
        "spec.group",
        "test_a_group_may_be_another_than_the_users",
    ),
    **{
        name: (
            "supervisor/limits.py",
            needle,
            "test_limits_variables_and_the_nice_value_hold_before_user_code",
        )
        for name, needle in {
            "umask": "spec.umask",
            "nofile": '"nofile"',
            "nproc": '"nproc"',
            "core": '"core_bytes"',
            "nice": "spec.nice",
            "env": "spec.env",
        }.items()
    },
}


def test_every_setting_names_the_place_that_goes_by_it() -> None:
    assert set(EFFECTS) == set(Settings.table), "a setting has an effect, or it is none"


@pytest.mark.parametrize("name", EFFECTS)
def test_the_place_goes_by_the_setting_and_its_test_is_there(name: str) -> None:
    file, text, test = EFFECTS[name]

    assert text in (ROOT / file).read_text()
    assert test in all_tests()


def all_tests() -> set[str]:
    """The names of all tests, and those of their files; the empty one."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    found = {"", *(file.stem for file in files)}
    for file in files:
        found.update(re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE))
    return found
