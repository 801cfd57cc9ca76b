"""Kafka as a broker, part by part; `session` puts them together.

An event's way: `poller` reads chunks and opens packs (`packs`), `sources` drops what a crash of
its sender has sent twice. What the group sent leaves through `producing`; `markers` say up to
where everything counts; `recovery` reads markers and changelogs and takes the partitions over.
"""
