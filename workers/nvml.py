"""What NVIDIA's driver tells of GPUs, by NVML: use, memory, power, heat, and faults (Xid).

Its bindings, ``nvidia-ml-py``, are optional (the extra ``gpu``). A call may hang with its device,
so all of them belong in a thread that nobody waits for (:mod:`workers.device_watch`).
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_NEEDS_RESET = frozenset({46, 48, 64, 95, 119})
_NEEDS_MORE = frozenset({74, 79})
_HITS_ONE_PROCESS = frozenset({8, 13, 31, 43, 45})
"""Xids by what NVIDIA says is to be done ("Xid Catalog", resolution buckets RESET_GPU, RESTART_BM
and CONTACT_SUPPORT, RESTART_APP). Whom the last ones hit learns it from its own calls of CUDA."""
_RECOVERIES = {1: "reset", 2: "reboot", 4: "reset", 6: "reset", 7: "reboot"}
"""Values of NVML_GPU_RECOVERY_ACTION that take a GPU out of use; the others concern its links."""


class UnwatchedError(Exception):
    """There is nothing to ask; the message says why."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Who it is: as NVML counts and names it."""

    uuid: str
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class GpuFigures:
    """Of one moment; None: this GPU, or its driver, does not tell."""

    gpu: Gpu
    busy_percent: int | None = None
    """Share of the last moments in which a kernel ran."""
    used_bytes: int | None = None
    """Of its memory, by all processes."""
    free_bytes: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    remedy: str = ""
    """What it must have before it is of use again: reset or reboot; empty: nothing."""


@dataclass(frozen=True, slots=True)
class Xid:
    """An error that the driver reported, by its number in NVIDIA's catalogue."""

    uuid: str
    number: int

    @property
    def action(self) -> str:
        """What is to be done: restart_app, reset_gpu, contact_support; or unknown."""
        if self.number in _HITS_ONE_PROCESS:
            return "restart_app"
        if self.number in _NEEDS_RESET:
            return "reset_gpu"
        return "contact_support" if self.number in _NEEDS_MORE else "unknown"

    @property
    def is_fault(self) -> bool:
        """Whether the GPU is of no use to any process until somebody mends it."""
        return self.action in ("reset_gpu", "contact_support")


class GpuDriver(Protocol):
    """Who can be asked about GPUs. Any call may wait for a device that hangs."""

    def look(self) -> list[GpuFigures]: ...

    def next_xid(self, timeout_s: float) -> Xid | None:
        """The next error; None when none came in time, or errors are not told here."""
        ...


class Nvml:
    """Implements :class:`GpuDriver` for the GPUs with ``uuids``.

    Raises:
        UnwatchedError: when made, if the bindings, the driver or one of the GPUs is not there.
    """

    def __init__(self, uuids: Sequence[str]) -> None:
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise UnwatchedError("nvidia-ml-py is not installed (the extra gpu).") from error
        try:
            self._nvml.nvmlInit()
            self._handles = {uuid: self._nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids}
            self._gpus = [self._gpu(uuid, handle) for uuid, handle in self._handles.items()]
            self.look()
            self._events = self._asked(self._listen)
        except self._nvml.NVMLError as error:
            raise UnwatchedError(f"NVML: {error}") from error
        except AttributeError as error:
            raise UnwatchedError(f"nvidia-ml-py is too old: {error}") from error

    def look(self) -> list[GpuFigures]:
        return [self._look_at(gpu, self._handles[gpu.uuid]) for gpu in self._gpus]

    def next_xid(self, timeout_s: float) -> Xid | None:
        if self._events is None:
            return None
        told = self._asked(
            lambda: self._nvml.nvmlEventSetWait_v2(self._events, int(timeout_s * 1000))
        )
        if told is None or told.eventType != self._nvml.nvmlEventTypeXidCriticalError:
            return None
        # A GPU that is gone may not tell even its name; mostly there is but one.
        uuid = self._asked(lambda: self._nvml.nvmlDeviceGetUUID(told.device))
        return Xid(uuid or self._gpus[0].uuid, int(told.eventData))

    def _gpu(self, uuid: str, handle: Any) -> Gpu:
        nvml = self._nvml
        return Gpu(uuid, nvml.nvmlDeviceGetIndex(handle), nvml.nvmlDeviceGetName(handle))

    def _listen(self) -> Any:
        events = self._nvml.nvmlEventSetCreate()
        for handle in self._handles.values():
            self._nvml.nvmlDeviceRegisterEvents(
                handle, self._nvml.nvmlEventTypeXidCriticalError, events
            )
        return events

    def _look_at(self, gpu: Gpu, handle: Any) -> GpuFigures:
        nvml = self._nvml
        rates = self._asked(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        memory = self._asked(lambda: nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2))
        power_mw = self._asked(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return GpuFigures(
            gpu,
            busy_percent=None if rates is None else rates.gpu,
            used_bytes=None if memory is None else memory.used,
            free_bytes=None if memory is None else memory.free,
            power_w=None if power_mw is None else power_mw / 1000,
            temperature_c=self._asked(
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
            remedy=self._remedy(handle),
        )

    def _remedy(self, handle: Any) -> str:
        nvml = self._nvml
        field = nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
        try:
            [told] = nvml.nvmlDeviceGetFieldValues(handle, [field])
        except nvml.NVMLError_GpuIsLost:
            return "reboot"
        except nvml.NVMLError_ResetRequired:
            return "reset"
        except nvml.NVMLError:
            return ""
        return "" if told.nvmlReturn else _RECOVERIES.get(told.value.uiVal, "")

    def _asked(self, ask: Callable[[], T]) -> T | None:
        try:
            return ask()
        except self._nvml.NVMLError:
            return None
