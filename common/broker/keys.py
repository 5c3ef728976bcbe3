"""Key names that Python touches itself; all others are built inside the functions.

The table of every key, its type and its time to live stands at the top of ``functions.lua``. All
keys of one partition of a pool share the hash tag ``{pool/partition}`` and so one Cluster slot.
"""

from common.messages import RANKS, Lane


def prefix(pool: str, partition: int = 0) -> str:
    return f"hr:{{{pool}/{partition}}}:"


def clock(prefix: str) -> str:
    """The key that names the partition to every function."""
    return f"{prefix}clock"


def bell(prefix: str, lane: Lane = "default") -> str:
    """A list on which idle workers block; interactive lanes share one."""
    return f"{prefix}bell:{lane}" if RANKS[lane] else f"{prefix}bell"


def ended(prefix: str) -> str:
    return f"{prefix}ended"


def dead(prefix: str) -> str:
    """stream: generations that are kept aside because workers died of them."""
    return f"{prefix}dead"


def mark(prefix: str) -> str:
    """What is written before waiting for the disk."""
    return f"{prefix}mark"


def inbox(prefix: str, gateway: str) -> str:
    return f"{prefix}inbox:{gateway}"


def document(prefix: str, request_id: str) -> str:
    return f"{prefix}doc:{request_id}"


def tenants(prefix: str) -> str:
    return f"{prefix}tenants"


def quota(prefix: str, key_id: str) -> str:
    return f"{prefix}quota:{key_id}"


def using(prefix: str, key_id: str) -> str:
    return f"{prefix}using:{key_id}"


def overviews(prefix: str) -> str:
    """stream: what the pool looked like, second by second."""
    return f"{prefix}overview:seconds"


def overview_rows(prefix: str) -> str:
    """stream: the numbers of the same seconds, without the rest."""
    return f"{prefix}overview:rows"


def overview_lease(prefix: str) -> str:
    """string: who makes them."""
    return f"{prefix}overview:lease"


def dead_letter(prefix: str, generation_id: str) -> str:
    return f"{prefix}dead:{generation_id}"


def errors_of(prefix: str, code: str) -> str:
    """list: requests that lately failed with the code, the newest first."""
    return f"{prefix}errors:{code}"


# Beside the pools, in one slot, and without a time to live: see key_store.py.

API_KEYS = "hr:{access}:keys"
"""hash: key id -> the key, without its secret."""
API_KEYS_USED = "hr:{access}:used"
"""hash: key id -> when it was last used, in seconds."""
PEPPER = "hr:{access}:pepper"
"""string: fingerprint of the pepper that the keys are hashed under."""

# Batches, likewise beside the pools and in one slot: see batch_store.py.

BATCH_CHANGES = "hr:{batches}:changes"
"""stream: one record per change of any batch, with its id."""
ENDED_BATCHES = "hr:{batches}:ended"
"""zset: batch -> when it ended, in seconds, while its folder in storage is kept."""


def batch(batch_id: str) -> str:
    """string: the record."""
    return f"hr:{{batches}}:batch:{batch_id}"


def batch_lease(batch_id: str) -> str:
    """string: name of the process that steers it."""
    return f"hr:{{batches}}:lease:{batch_id}"


def batches_of(tenant: str) -> str:
    """zset: batch -> when it was created, in milliseconds."""
    return f"hr:{{batches}}:of:{tenant}"


def active_batches(pool: str) -> str:
    """zset: batch of this pool that has not ended -> when it was created, in seconds."""
    return f"hr:{{batches}}:active:{pool}"


# Webhooks, likewise: see webhook_store.py. Endpoints have no time to live.

WEBHOOK_ENDPOINTS = "hr:{webhooks}:endpoints"
"""hash: endpoint id -> the endpoint, without its secret."""
WEBHOOK_DELIVERIES = "hr:{webhooks}:deliveries"
"""zset: delivery -> when its event was, in seconds."""
DUE_WEBHOOKS = "hr:{webhooks}:due"
"""zset: delivery that waits -> when it is sent next, in milliseconds."""
DEAD_WEBHOOKS = "hr:{webhooks}:dead"
"""zset: delivery that was given up -> when, in seconds."""
UNTOLD_BATCHES = "hr:{batches}:untold"
"""zset: batch whose end no webhook has been made of -> when it ended, in seconds."""


def webhook_delivery(delivery_id: str) -> str:
    """string: the record."""
    return f"hr:{{webhooks}}:delivery:{delivery_id}"


def webhook_lease(delivery_id: str) -> str:
    """string: somebody sends it right now."""
    return f"hr:{{webhooks}}:lease:{delivery_id}"


def told(prefix: str) -> str:
    """string: up to which end of a generation webhooks have been made."""
    return f"{prefix}told"


# Files, likewise: see file_store.py.

FILES_DUE = "hr:{files}:due"
"""zset: file, or what is being written to become one -> when it is to be removed, in seconds."""


def file(file_id: str) -> str:
    """string: the record."""
    return f"hr:{{files}}:file:{file_id}"


def file_bytes(tenant: str) -> str:
    """string: of all files of a tenant together."""
    return f"hr:{{files}}:bytes:{tenant}"


def files_of(tenant: str) -> str:
    """zset: file -> when it was created, in milliseconds."""
    return f"hr:{{files}}:of:{tenant}"
