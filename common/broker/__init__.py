"""All that talks to Redis: the protocol steps, the connection, the keys."""

from common.broker.broker import MAX_CHOICES, Broker
from common.broker.connection import Client, connect
from common.broker.key_store import KeyStore
from common.broker.steps import (
    Admission,
    Admitted,
    Attachment,
    ClaimAnswer,
    Claimed,
    GatewayBeat,
    GatewayState,
    Look,
    Moved,
    Page,
    PoolState,
    Presentation,
    Publication,
    PublishAnswer,
    Refusal,
    WorkerPresence,
    WorkerState,
)

__all__ = [
    "MAX_CHOICES",
    "Admission",
    "Admitted",
    "Attachment",
    "Broker",
    "ClaimAnswer",
    "Claimed",
    "Client",
    "GatewayBeat",
    "GatewayState",
    "KeyStore",
    "Look",
    "Moved",
    "Page",
    "PoolState",
    "Presentation",
    "Publication",
    "PublishAnswer",
    "Refusal",
    "WorkerPresence",
    "WorkerState",
    "connect",
]
