"""A changelog that somebody deleted: its table is never taken for an empty one."""

from confluent_kafka.admin import AdminClient
from kafka_app import WORDS, eventually, site
from kafka_clients import unique


def test_a_deleted_changelog_is_refused_until_its_table_is_made_again_by_a_reset(
    kafka: str,
) -> None:
    with site(WORDS, unique("table"), kafka) as words:
        words.do(["send", f"{words.id}-posts", "a b a"])
        words.do("start")
        eventually(lambda: words.count_of("a") == 2)
        words.do("stop")
        changelog = f"{words.id}-counts-changes"
        admin = AdminClient({"bootstrap.servers": kafka})
        admin.delete_topics([changelog])[changelog].result(30)

        # The first start makes it anew, empty; the second finds it there.
        for refused in (words.run("start"), words.run("start")):
            said = refused.stdout + refused.stderr
            assert refused.returncode == 78, said
            assert f"topic '{changelog}' was deleted and made anew: the rows of table" in said
            assert "`streamd reset` makes them again" in said
        eventually(lambda: words.run("reset --yes").returncode == 0)
        words.do(["send", f"{words.id}-posts", "a"])
        words.do("start")
        eventually(lambda: words.count_of("a") == 3)
        assert words.count_of("b") == 1
