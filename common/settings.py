"""Settings of each process: one class per role, every field a variable ``HEADRACE_…``.

Nothing reads the environment at import: a process builds its settings once at start, and a bad
value stops that start with the name of the field. A field's docstring is its help text.
"""

import ipaddress
from importlib.util import find_spec
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
Compat = Literal["vllm-current", "vllm-0.10", "tgi"]


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

    otlp_endpoint: str = ""
    """Collector of OpenTelemetry that spans are sent to, by HTTP: ``http://127.0.0.1:4318``; needs
    the extra ``otel``. Unset: none are made."""
    otlp_service_name: str = "headrace"
    """What the spans call this service."""

    @field_validator("otlp_endpoint")
    @classmethod
    def _refuse_unusable_endpoint(cls, endpoint: str) -> str:
        url = urlsplit(endpoint)
        if endpoint and (url.scheme not in ("http", "https") or not url.hostname):
            raise ValueError(f"otlp_endpoint must be an http:// or https:// URL, got {endpoint!r}")
        if endpoint and find_spec("opentelemetry") is None:
            raise ValueError("otlp_endpoint needs the extra otel: pip install 'headrace[otel]'")
        return endpoint

    @field_validator("redis_url")
    @classmethod
    def _refuse_open_redis(cls, redis_url: str, info: ValidationInfo) -> str:
        if is_open_redis(redis_url) and not info.data.get("allow_open_redis"):
            raise ValueError(
                "a Redis on another host needs a password (redis://user:password@host, better "
                "rediss://), unless you say --allow-open-redis"
            )
        return redis_url


class MetricsSettings(Settings):
    """What every process that shows figures knows."""

    metrics_compat: tuple[Compat, ...] = ("vllm-current", "tgi")
    """Whose names figures have beside our own: ``vllm-current``, ``vllm-0.10`` (the names that
    vLLM has given up since, for dashboards that still ask for them), ``tgi``."""


class MetricsPortSettings(MetricsSettings):
    """Of processes that do nothing else over HTTP."""

    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port on which Prometheus reads the figures of this process; 0: none. `headrace up` finds a
    free one for each of its processes."""
    metrics_host: str = "127.0.0.1"
    """Address of that port. There is no key for it: open it to where Prometheus is, not to all."""


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
    max_input_tokens: int = Field(default=0, ge=0)
    """Longest prompt in tokens; 0: all of ``max_total_tokens`` but one."""
    max_stop_sequences: int = Field(default=4, ge=0)
    """Most stop strings in one request."""
    max_best_of: int = Field(default=2, ge=1, le=16)
    """Most answers that TGI's ``best_of`` may choose from; OpenAI's ``n`` and ``best_of`` may be up
    to 16."""
    max_top_n_tokens: int = Field(default=5, ge=0, le=20)
    """Most of the likeliest tokens that TGI's ``top_n_tokens`` may ask for with each token."""
    max_client_batch_size: int = Field(default=32, ge=1, le=256)
    """Most prompts in one request to ``/v1/completions``; each is queued as its own request."""
    disable_grammar_support: bool = False
    """Refuse requests that constrain their answer by a grammar or a schema."""
    watermark_gamma: float = Field(default=0.5, gt=0, lt=1)
    """Share of the vocabulary that is green behind each token, where a watermark is asked for."""
    watermark_delta: float = Field(default=2.0, ge=0, le=100)
    """What a watermark adds to the scores of green tokens."""
    run_limit_s: float = Field(default=600.0, gt=0)
    """Longest run of a generation after its first claim."""
    lane_cap_tokens: int = Field(default=4_000_000, ge=1)
    """Most tokens of work (prompt plus allowed new tokens) that may wait in one lane."""
    lane_cap_bytes: int = Field(default=256 * 1024 * 1024, ge=1)
    """Most bytes of prompts that may wait in one lane."""

    @model_validator(mode="after")
    def _leave_room_for_an_answer(self) -> "OrderSettings":
        if self.max_input_tokens >= self.max_total_tokens:
            raise ValueError(
                f"max_input_tokens must be < max_total_tokens, got {self.max_input_tokens} "
                f"and {self.max_total_tokens}"
            )
        return self


class GatewaySettings(MetricsSettings, KeySettings, OrderSettings, StorageSettings):
    """The HTTP side."""

    host: str = "127.0.0.1"
    """Address to listen on; ``0.0.0.0`` for every network interface."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port to listen on; 0: a free one."""
    predict_route: str = Field(default="", pattern="^(/.*)?$")
    """Path that answers a POST as ``/vertex`` does, beside it; empty: none."""
    health_route: str = Field(default="", pattern="^(/.*)?$")
    """Path that answers a GET as ``/ping`` does, beside it; empty: none."""
    api_key: SecretStr = SecretStr("")
    """One key for everything, as TGI's: whoever sends it is the tenant ``public`` and may do all.
    Better: ``headrace keys create``."""
    allow_anonymous: bool = False
    """Serve whoever sends no key as the tenant ``public``. Unset: only as long as there are no keys
    and the address is a loopback one; on any other a gateway without keys does not start."""
    allowed_hosts: tuple[str, ...] = ()
    """Names beside ``localhost`` and loopback addresses by which a gateway on loopback without keys
    may be called, whatever the port: those of a proxy that passes the caller's ``Host`` on. Others
    are refused, since a web page in a browser here could have made them point to this machine."""
    arrival_limit_s: float = Field(default=60.0, gt=0)
    """Most time that the head of a request may take to come, and then its body; files that are
    uploaded only have to make progress."""
    max_idle_connections: int = Field(default=4096, ge=1)
    """Most connections of one gateway on which no request is being answered; above it, the one that
    has been idle longest is closed."""
    max_concurrent_requests: int = Field(default=0, ge=0)
    """Most generations that one gateway has open at once, waiting ones too; who comes on top is
    refused with 429. 0: no limit but those of the queue."""
    queue_limit_s: float = Field(default=60.0, gt=0)
    """Longest wait in the queue; who would wait longer is refused at once with 429."""
    retention_s: float = Field(default=600.0, gt=0)
    """How long an ended stream can still be read."""
    response_retention_s: float = Field(default=3600.0, gt=0)
    """How long an ended response (``/v1/responses``) that asks to be stored can still be read."""
    tenant_files_bytes: int = Field(default=0, ge=0)
    """Most bytes of files that one tenant may have at once; results of batches count, but only
    uploads are refused. 0: no limit."""
    disconnect_grace_s: float = Field(default=5.0, ge=0)
    """How long a generation goes on without a reader, unless the request says otherwise."""
    keep_alive_s: float = Field(default=15.0, gt=0)
    """Silence after which a comment is sent on a stream."""
    cors_allow_origin: tuple[str, ...] = ()
    """Origins that a browser may call from; empty: only the gateway's own page."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long open streams may go on after SIGTERM."""


class WorkerSettings(MetricsPortSettings):
    """The engine side."""

    engine: Literal["torch", "simulated"] = "torch"
    """``simulated`` answers with scripted text and set latencies, without a model or torch."""
    dtype: Dtype = "auto"
    """``auto``: bfloat16 where the device has it in hardware, else float32. ``float16`` is for
    CUDA."""
    quantize: Quantize = "none"
    """``int8``: weights in 8 bits, a scale for each 32 of them. They take half of the memory, and
    few generations at once run up to twice as fast. Needs one of the native ways. Such a worker
    does not go on with what one without it began."""
    device: str = "auto"
    """``cpu``, ``cuda``, or ``auto``."""
    tensor_parallel: int = Field(default=1, ge=1, le=64)
    """Devices that one copy of the model is spread over, each with a process of its own: for models
    that do not fit one. GPUs of this machine, or, to try it, its processor. Such a worker does not
    go on with what one of another number began."""
    engine_way: EngineWay = "auto"
    """How a step is computed on a processor (on CUDA ``auto`` is paged attention in recorded steps,
    and ``plain`` torch as it is): ``step``, the whole of it in own kernels;
    ``operations``, own kernels inside the model's modules; ``modules``, torch with packed weights;
    ``plain``, torch as it is; ``auto``: the first of these that takes the model on this machine."""
    num_threads: int = Field(default=0, ge=0)
    """Threads that compute; 0: one per core, or this worker's share of them."""
    max_batch_size: int = Field(default=32, ge=1, le=256)
    """Most generations in one step; also the number of cache slots."""
    max_batch_total_tokens: int = Field(default=65_536, ge=2)
    """Most tokens of cache promised to running generations (prompt plus allowed new tokens)."""
    cuda_memory_share: float = Field(default=0.85, gt=0, le=1)
    """On CUDA: share of the memory free after loading that the cache takes. It holds as much as
    fits there, unless ``max_batch_total_tokens`` is set and needs less."""
    max_step_tokens: int = Field(default=512, ge=1)
    """Most tokens in one forward pass: decode rows first, then as much of new prompts as does not
    hold up those who read."""
    max_adapters: int = Field(default=16, ge=1)
    """Most LoRA adapters in memory; the one that was longest without work gives way to another."""
    speculation: Literal["auto", "off"] = "auto"
    """``auto``: where text of the prompt or the answer seems to come again, several tokens are
    guessed and checked in one step, if that is measured to be worth its time here; the answers are
    the same. ``off``: one token per step."""
    prefix_cache: PrefixCache = "tenant"
    """Whose computed prompts a new prompt may begin with: ``tenant``, those of the same tenant;
    ``shared``, everybody's: a common preamble is computed once, but from how soon a first token
    comes, a tenant can tell whether another has lately sent a prompt that begins alike; ``off``,
    nobody's."""
    grammar_max_bytes: int = Field(default=256 * 1024, ge=1)
    """Largest JSON schema, regular expression or EBNF that an answer may have to match."""
    grammar_compile_s: float = Field(default=2.0, gt=0)
    """Most processor time that one may take to compile, in a process apart."""
    lease_ms: int = Field(default=5000, ge=500)
    """Time without a beat after which this worker counts as dead."""
    beat_ms: int = Field(default=1500, ge=100)
    """Time between beats; well under a third of the lease."""
    drain_s: float = Field(default=20.0, ge=0)
    """How long running generations may finish here after SIGTERM before they are handed over."""
    step_timeout_s: float = Field(default=20.0, gt=0)
    """A step that takes longer is a stall: beats stop and the process exits."""
    simulated_first_token_ms: float = Field(default=20.0, ge=0)
    """Simulated engine: time from claim to first token."""
    simulated_inter_token_ms: float = Field(default=10.0, ge=0)
    """Simulated engine: time between tokens."""


class BackgroundSettings(MetricsPortSettings, KeySettings, OrderSettings, StorageSettings):
    """The arq side: what has minutes."""

    background_redis_url: str = ""
    """Where background jobs wait; unset: ``redis_url``. arq can not use a Redis Cluster, so a
    deployment on one needs a small server of its own for this. Nothing that must last lies there.
    """

    allow_private_webhooks: bool = False
    """Send webhooks to private addresses, over plain HTTP and to any port, too: for receivers in
    the same closed network. Whoever may add endpoints then reaches whatever this process does."""

    @field_validator("background_redis_url")
    @classmethod
    def _refuse_open_background(cls, redis_url: str, info: ValidationInfo) -> str:
        return cls._refuse_open_redis(redis_url, info) if redis_url else ""


class ExporterSettings(MetricsPortSettings):
    """What shows the figures of a whole pool."""

    metrics_port: int = Field(default=9290, ge=0, le=65535)
    """Port on which Prometheus reads the figures of the pool; 0: a free one."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``, an address or a name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_open_redis(redis_url: str) -> bool:
    """Whether the URL leads to another host and shows neither a password nor a certificate."""
    url = urlsplit(redis_url)
    if url.scheme not in ("redis", "rediss") or is_loopback(url.hostname or "localhost"):
        return False
    shown = parse_qs(url.query)
    return not (url.password or "password" in shown or "ssl_certfile" in shown)


def first_error(error: ValidationError) -> str:
    """One line that names the offending setting as an option and as an environment variable."""
    detail = error.errors()[0]
    if not detail["loc"]:  # about several settings, which the message names
        return detail["msg"].removeprefix("Value error, ")
    name = str(detail["loc"][0])
    return f"{name} (HEADRACE_{name.upper()}): {detail['msg']}, got {detail.get('input')!r}"
