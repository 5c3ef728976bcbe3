"""What `headrace up` starts: the command line, environment and patience of each process."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from common.models.simulated import SIMULATED_MODEL
from common.models.sources import find_source
from common.settings import (
    Dtype,
    GatewaySettings,
    KeySettings,
    MetricsSettings,
    Quantize,
    StorageSettings,
    WorkerSettings,
)
from ops import runfile
from ops.supervisor import ProcessSpec

_BEYOND_DRAIN_S = 10.0
"""What a process may need after its drain, before it is killed."""
_BACKGROUND_STOP_S = 15.0
_EXPORTER_STOP_S = 10.0
_GPUS = Path("/proc/driver/nvidia/gpus")
"""Where NVIDIA's driver for Linux has a folder for each GPU."""
EXPORTER = "exporter"


class UpSettings(MetricsSettings, StorageSettings):
    """What `headrace up` starts. All other settings reach its processes by environment."""

    redis_url: str = ""
    """A Redis ≥ 7.0 or Valkey of your own; unset: an embedded Valkey on a private socket."""
    log_dir: Path | None = None
    """Where JSON lines go (``<role>.jsonl``); unset: ``log`` in the data directory."""
    log_max_bytes: int = Field(default=256 * 1024 * 1024, ge=1024)
    """Size at which a log is moved away and compressed; some 5 kB are written for each request."""
    log_num_kept: int = Field(default=8, ge=0)
    """Compressed logs that are kept of each role."""
    host: str = "127.0.0.1"
    """Address the gateways listen on; ``0.0.0.0`` for every network interface."""
    allow_anonymous: bool = False
    """Serve whoever sends no key, on any address and also when there are keys; see `headrace keys`.
    """
    port: int = Field(default=8080, ge=0, le=65535)
    """Port of the first gateway; 0: a free one."""
    gateways: int = Field(default=1, ge=1, le=64)
    """Number of gateways, on consecutive ports."""
    workers: int = Field(default=1, ge=0, le=64)
    """Number of workers, each with its own copy of the model."""
    background: int = Field(default=1, ge=1, le=64)
    """Number of background workers, which share the batches between them."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of the exporter, which shows the figures of all together; 0: a free one. Where all are
    found stands in ``run/prometheus-targets.json`` in the data directory, for Prometheus."""
    metrics_host: str = "127.0.0.1"
    """Address on which the exporter, workers and background workers show figures."""
    engine: Literal["torch", "simulated"] = "torch"
    """``simulated`` answers with scripted text and set latencies; needs no model and no torch."""
    dtype: Dtype = "auto"
    """Precision of the model; in ``float32`` no answer depends on what else runs in its batch."""
    quantize: Quantize = "none"
    """``int8``: weights in half of the memory, and up to twice the speed for few at once."""
    tensor_parallel: int = Field(default=1, ge=1, le=64)
    """Devices that each worker's copy of the model is spread over."""

    model_id: str = ""
    """Where the model comes from on the first start: a hub id (org/name), a directory or a GGUF
    file. Its last part becomes the model's name."""
    revision: str = ""
    """Commit, tag or branch of a hub id."""

    @model_validator(mode="before")
    @classmethod
    def _name_after_source(cls, given: dict[str, object]) -> dict[str, object]:
        source, revision = given.get("model_id"), given.get("revision")
        if source:
            if revision:
                source = given["model_id"] = f"{source}@{revision}"
            given.setdefault("model", find_source(str(source)).default_name)
        return given

    @model_validator(mode="before")
    @classmethod
    def _simulate_without_download(cls, given: dict[str, object]) -> dict[str, object]:
        """The simulated engine serves the model without weights, unless another one is named."""
        if given.get("engine") == "simulated":
            given.setdefault("model", SIMULATED_MODEL)
        return given


class DoctorSettings(KeySettings, StorageSettings):
    """What `headrace doctor` looks at."""

    host: str = "127.0.0.1"
    """Address that gateways are to listen on."""
    port: int = Field(default=8080, ge=1, le=65535)
    """Port that the first gateway is to listen on."""


@dataclass(frozen=True, slots=True)
class Processes:
    """Specs of all processes but the server, for one start.

    Raises: pydantic.ValidationError, when made, for a setting that a process would refuse.
    """

    settings: UpSettings
    redis_url: str
    data_dir: Path
    log_dir: Path
    ports: list[int]
    metrics_ports: Mapping[str, int] = field(default_factory=dict[str, int])
    """By the name of a process that shows its figures on a port of their own."""

    def specs(self) -> list[ProcessSpec]:
        return [*self._gateways(), *self._workers(), *self._background(), self._exporter()]

    def address(self, port: int) -> str:
        """Where a browser on this machine finds the gateway of ``port``."""
        return f"http://{_netloc(reachable(self.settings.host), port)}"

    def targets(self) -> list[runfile.Target]:
        """Where Prometheus reads the figures of each process."""
        host = self.settings.metrics_host
        places = [
            ("gateway", f"gateway {n}", self.settings.host, port) for n, port in self._numbered
        ]
        places += [
            (name.partition(" ")[0], name, host, port) for name, port in self.metrics_ports.items()
        ]
        return [
            runfile.Target(
                targets=[_netloc(reachable(host), port)],
                labels={"service": role, "instance": name.replace(" ", "-")},
            )
            for role, name, host, port in places
        ]

    @property
    def _numbered(self) -> list[tuple[int, int]]:
        """Gateways by their number, with their port."""
        return list(enumerate(self.ports, start=1))

    def _gateways(self) -> list[ProcessSpec]:
        stop_timeout_s = GatewaySettings().drain_s + _BEYOND_DRAIN_S
        return [
            ProcessSpec(
                role="gateway",
                name=f"gateway {n}",
                argv=_python("gateway"),
                env=self._env(
                    HOST=self.settings.host,
                    PORT=port,
                    ALLOW_ANONYMOUS=self.settings.allow_anonymous,
                ),
                stop_timeout_s=stop_timeout_s,
                address=self.address(port),
            )
            for n, port in self._numbered
        ]

    def _workers(self) -> list[ProcessSpec]:
        settings = self.settings
        env = self._env(
            ENGINE=settings.engine,
            DTYPE=settings.dtype,
            QUANTIZE=settings.quantize,
            TENSOR_PARALLEL=settings.tensor_parallel,
        )
        # Each would take every core, and together they would be slower than one.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if settings.workers > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // settings.workers)))
        stop_timeout_s = WorkerSettings().drain_s + _BEYOND_DRAIN_S
        return [
            ProcessSpec(
                "worker",
                name,
                _python("workers"),
                env | self._gpus(n) | self._metrics(name),
                stop_timeout_s,
            )
            for n, name in enumerate(worker_names(settings))
        ]

    def _gpus(self, worker: int) -> dict[str, str]:
        """Of several workers each takes the next GPU, or the next so many that its model is spread
        over. Where they are too few for workers that need but one, some share one and its memory.
        """
        count, workers = self.settings.tensor_parallel, self.settings.workers
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        if workers == 1 or (count == 1 and WorkerSettings().device not in ("auto", "cuda")):
            return {}
        if given is not None:
            gpus = given.split(",") if given else []
        else:
            gpus = [str(n) for n in range(_num_gpus() if count == 1 else count * workers)]
        if count > 1:
            return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[worker * count : (worker + 1) * count])}
        if not gpus:
            return {}
        place = worker % len(gpus)
        share = WorkerSettings().cuda_memory_share / len(range(place, workers, len(gpus)))
        return {
            "CUDA_VISIBLE_DEVICES": gpus[place],
            "HEADRACE_CUDA_MEMORY_SHARE": f"{share:.4f}",
        }

    def _background(self) -> list[ProcessSpec]:
        argv, env = _python("workers.background"), self._env()
        return [
            ProcessSpec("background", name, argv, env | self._metrics(name), _BACKGROUND_STOP_S)
            for name in background_names(self.settings)
        ]

    def _exporter(self) -> ProcessSpec:
        env = self._env() | self._metrics(EXPORTER)
        return ProcessSpec("exporter", EXPORTER, _python("ops.exporter"), env, _EXPORTER_STOP_S)

    def _metrics(self, name: str) -> dict[str, str]:
        """An address of its own for figures."""
        return {
            "HEADRACE_METRICS_HOST": self.settings.metrics_host,
            "HEADRACE_METRICS_PORT": str(self.metrics_ports.get(name, 0)),
        }

    def _env(self, **own: object) -> dict[str, str]:
        """The environment of this process, with our settings over it."""
        shared: Mapping[str, object] = {
            "REDIS_URL": self.redis_url,
            "DATA_DIR": self.data_dir,
            "STORAGE_URL": self.settings.storage_url,
            "LOG_DIR": self.log_dir,
            "ALLOW_OPEN_REDIS": self.settings.allow_open_redis,
            "MODEL": self.settings.model,
            "OTLP_ENDPOINT": self.settings.otlp_endpoint,
            "OTLP_SERVICE_NAME": self.settings.otlp_service_name,
            "MAX_TOTAL_TOKENS": self.settings.max_total_tokens,
            "METRICS_COMPAT": json.dumps(self.settings.metrics_compat),
        }
        ours = {f"HEADRACE_{name}": str(value) for name, value in {**shared, **own}.items()}
        return {**os.environ, **ours}


def _num_gpus() -> int:
    """Those that NVIDIA's driver knows on this machine."""
    return len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0


def worker_names(settings: UpSettings) -> list[str]:
    return [f"worker {n + 1}" for n in range(settings.workers)]


def background_names(settings: UpSettings) -> list[str]:
    count = settings.background
    return ["background"] if count == 1 else [f"background {n + 1}" for n in range(count)]


def reachable(host: str) -> str:
    """The address to connect to for a server that listens on ``host``."""
    every_interface = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound here
    return every_interface.get(host, host)


def _netloc(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _python(module: str) -> list[str]:
    # -P: a folder named `gateway` in the current directory must not be taken for ours.
    return [sys.executable, "-P", "-m", module]
