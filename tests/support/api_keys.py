"""API keys on the server of a test, made without the command."""

import time
from typing import Any

import msgspec

from common import keys
from common.broker import Broker
from common.keys import ApiKey

PEPPER = "p" * 32
"""What gateways are given as ``key_pepper``."""


async def make_key(broker: Broker, tenant: str, **fields: Any) -> str:
    """The text of a new key; ``fields`` are those of :class:`ApiKey`."""
    key_id = keys.new_key_id()
    text = keys.new_key_text(key_id)
    key = ApiKey(
        id=key_id,
        tenant=tenant,
        hash=keys.hashed(PEPPER.encode(), text),
        created_s=int(time.time()),
    )
    await broker.key_store.add(
        msgspec.structs.replace(key, **fields), keys.fingerprint(PEPPER.encode())
    )
    return text


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
