"""What `headrace up` starts: the command line, environment and patience of each process."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from common.models.simulated import SIMULATED_MODEL
from common.models.sources import find_source
from common.settings import (
    Dtype,
    GatewaySettings,
    KeySettings,
    Quantize,
    StorageSettings,
    WorkerSettings,
)
from ops.supervisor import ProcessSpec

_BEYOND_DRAIN_S = 10.0
"""What a process may need after its drain, before it is killed."""
_BACKGROUND_STOP_S = 15.0


class UpSettings(StorageSettings):
    """What `headrace up` starts. All other settings reach its processes by environment."""

    redis_url: str = ""
    """A Redis ≥ 7.0 or Valkey of your own; unset: an embedded Valkey on a private socket."""
    log_dir: Path | None = None
    """Where JSON lines go (``<role>.jsonl``); unset: ``log`` in the data directory."""
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

    def specs(self) -> list[ProcessSpec]:
        return [*self._gateways(), *self._workers(), *self._background()]

    def address(self, port: int) -> str:
        """Where a browser on this machine finds the gateway of ``port``."""
        host = reachable(self.settings.host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

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
            for n, port in enumerate(self.ports, start=1)
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
                "worker", f"worker {n + 1}", _python("workers"), env | self._gpus(n), stop_timeout_s
            )
            for n in range(settings.workers)
        ]

    def _gpus(self, worker: int) -> dict[str, str]:
        """Workers that spread their models over several take different ones: the next so many."""
        count = self.settings.tensor_parallel
        if count == 1 or self.settings.workers == 1:
            return {}
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        total = count * self.settings.workers
        gpus = [str(n) for n in range(total)] if given is None else given.split(",")
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[worker * count : (worker + 1) * count])}

    def _background(self) -> list[ProcessSpec]:
        count, argv, env = self.settings.background, _python("workers.background"), self._env()
        names = ["background"] if count == 1 else [f"background {n + 1}" for n in range(count)]
        return [ProcessSpec("background", name, argv, env, _BACKGROUND_STOP_S) for name in names]

    def _env(self, **own: object) -> dict[str, str]:
        """The environment of this process, with our settings over it."""
        shared: Mapping[str, object] = {
            "REDIS_URL": self.redis_url,
            "DATA_DIR": self.data_dir,
            "STORAGE_URL": self.settings.storage_url,
            "LOG_DIR": self.log_dir,
            "ALLOW_OPEN_REDIS": self.settings.allow_open_redis,
            "MODEL": self.settings.model,
            "MAX_TOTAL_TOKENS": self.settings.max_total_tokens,
        }
        ours = {f"HEADRACE_{name}": str(value) for name, value in {**shared, **own}.items()}
        return {**os.environ, **ours}


def reachable(host: str) -> str:
    """The address to connect to for a server that listens on ``host``."""
    every_interface = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound here
    return every_interface.get(host, host)


def _python(module: str) -> list[str]:
    # -P: a folder named `gateway` in the current directory must not be taken for ours.
    return [sys.executable, "-P", "-m", module]
