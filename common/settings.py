"""Settings of each process: one class per role, every field a variable ``HEADRACE_…``.

Nothing reads the environment at import: a process builds its settings once at start, and a bad
value stops that start with the name of the field. A field's docstring is its help text.
"""

import ipaddress
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from common.storage import check_storage_url

PrefixCache = Literal["tenant", "shared", "off"]
EngineWay = Literal["auto", "step", "operations", "modules", "plain"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["none", "int8"]


class Settings(BaseSettings):
    """What every process knows."""

    model_config = SettingsConfigDict(
        env_prefix="HEADRACE_", extra="ignore", frozen=True, use_attribute_docstrings=True
    )

    allow_open_redis: bool = False
    """Use a Redis on another host without a password: whoever reaches it reads prompts and forges
    answers, so its network must be as closed as it should be."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """Redis ≥ 7.0 or Valkey: ``redis://``, ``rediss://`` or ``unix://``."""
    durable_replicas: int = Field(default=0, ge=0)
    """Replicas of Redis that must have on their disk, as Redis itself, what is promised for later
    (a batch, a file, a response in the background) before it is promised. Redis ≥ 7.2 or Valkey."""
    data_dir: Path = Path("var")
    """Models, logs and the embedded server's data."""
    model: str = "SmolLM2-135M-Instruct"
    """Name of the model in the store, which is also the name of its pool."""
    log_dir: Path | None = None
    """Where JSON lines go (``<role>.jsonl`` appended); unset: standard output."""
    max_total_tokens: int = Field(default=4096, ge=2)
    """Longest prompt plus answer in tokens; the model's own limit applies below it."""

    @field_validator("redis_url")
    @classmethod
    def _refuse_open_redis(cls, redis_url: str, info: ValidationInfo) -> str:
        if is_open_redis(redis_url) and not info.data.get("allow_open_redis"):
            raise ValueError(
                "a Redis on another host needs a password (redis://user:password@host, better "
                "rediss://), unless you say --allow-open-redis"
            )
        return redis_url


class KeySettings(Settings):
    """What it takes to make API keys, and to check them."""

    key_pepper: SecretStr = SecretStr("")
    """Secret under which API keys are hashed, the same wherever they are made or checked; unset:
    ``keys.pepper`` in the data directory, drawn with the first key."""


class StorageSettings(Settings):
    """Where files lie; the same for gateways and background workers."""

    storage_url: str = ""
    """Where files and the results of batches lie: ``s3://bucket/prefix``, ``gs://…`` or ``az://…``,
    with credentials and endpoint in that store's own variables (``AWS_ACCESS_KEY_ID``,
    ``AWS_ENDPOINT_URL``, …), or ``file:///directory``. Unset: ``files`` in the data directory,
    which is right as long as gateways and background workers share one."""

    @field_validator("storage_url")
    @classmethod
    def _refuse_unknown_storage(cls, storage_url: str) -> str:
        return check_storage_url(storage_url)


class OrderSettings(Settings):
    """What may be asked for, and for how long it may run: the same whether a gateway takes it or a
    batch holds it.
    """

    payload_limit: int = Field(default=2_000_000, ge=1)
    """Largest body in bytes."""
    arrival_limit_s: float = Field(default=60.0, gt=0)
    """Most time that the head of a request may take to come, and then its body; files that are
    uploaded only have to make progress."""
    max_idle_connections: int = Field(default=4096, ge=1)
    """Most connections of one gateway on which no request is being answered; above it, the one that
    has been idle longest is closed."""
    max_concurrent_requests: int = Field(default=0, ge=0)
    """Most generations that one gateway has open at once, waiting ones too; who comes on top is
    refused with 429. 0: no limit but those of the queue."""
