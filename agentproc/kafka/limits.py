"""How large records may be: by what the producer takes, and by what each topic takes.

Checked when a record is sent or a row is made durable, so that the event at fault is known:
what a broker refuses later is a gap, and ends the process.
"""

import logging
from collections.abc import Iterable

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]

from streamd.agentproc.kafka.options import MESSAGE_BYTES
from streamd.agentproc.kafka.topics import TRY_S

log = logging.getLogger(__name__)

FRAME_BYTES = 1000  # what surrounds key and value of one record in a batch, with a stamp


def limits_of(admin: AdminClient, names: Iterable[str]) -> dict[str, int]:
    """The most bytes of key and value of a record of each topic. Blocks.

    Where the cluster does not tell, what the producer takes.
    """
    limits = dict.fromkeys(names, MESSAGE_BYTES)
    resources = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in limits]
    asked = admin.describe_configs(resources, request_timeout=TRY_S) if resources else {}
    for resource, future in asked.items():
        try:
            entry = future.result()["max.message.bytes"]
        except KafkaException as error:
            log.debug("the limit of topic %s is not told: %s", resource.name, error)
            continue
        most = int(entry.value) - FRAME_BYTES
        limits[resource.name] = max(1, min(MESSAGE_BYTES, most))
    return limits
