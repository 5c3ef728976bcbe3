"""All that talks to Redis: the protocol steps, the connection, the keys."""

from common.broker.batch_store import BatchStore, BatchWatch
from common.broker.broker import MAX_CHOICES, Broker
from common.broker.connection import Client, connect
from common.broker.key_store import KeyStore
from common.broker.steps import (
    Admission,
    Admitted,
    Attachment,
    ClaimAnswer,
    Claimed,
    Ended,
    GatewayBeat,
    GatewayState,
    LimitReached,
    Look,
    Moved,
    Page,
    PoolState,
    Presentation,
    Publication,
    PublishAnswer,
    Quota,
    QuotaState,
    Refusal,
    ServerFacts,
    WorkerPresence,
    WorkerState,
)
from common.broker.tenant_store import Holdings, TenantStore
from common.broker.webhook_store import WebhookStore

__all__ = [
    "MAX_CHOICES",
    "Admission",
    "Admitted",
    "Attachment",
    "BatchStore",
    "BatchWatch",
    "Broker",
    "ClaimAnswer",
    "Claimed",
    "Client",
    "Ended",
    "GatewayBeat",
    "GatewayState",
    "Holdings",
    "KeyStore",
    "LimitReached",
    "Look",
    "Moved",
    "Page",
    "PoolState",
    "Presentation",
    "Publication",
    "PublishAnswer",
    "Quota",
    "QuotaState",
    "Refusal",
    "ServerFacts",
    "TenantStore",
    "WebhookStore",
    "WorkerPresence",
    "WorkerState",
    "connect",
]
