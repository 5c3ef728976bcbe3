"""A stand-in for the driver's own shared object, ``libnvidia-ml``, below the real bindings.

It answers the C calls that ``pynvml`` makes of it, with GPUs as a test wants them.
"""
# ruff: noqa: N802 - these are the names of its functions

import ctypes
import queue
from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest

from workers.engine.port import DeviceMemory

OK = 0
_NOT_FOUND = pynvml.NVML_ERROR_NOT_FOUND
_NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
_TIMEOUT = pynvml.NVML_ERROR_TIMEOUT
_MIB = 1 << 20


@dataclass
class FakeGpu:
    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    busy_percent: int = 93
    used_mib: int = 61_000
    reserved_mib: int = 600
    total_mib: int = 81_559
    power_mw: int = 412_345
    temperature_c: int = 58
    recovery: int = pynvml.NVML_GPU_RECOVERY_ACTION_NONE
    error: int = OK
    """What all questions about it are answered with, but who it is."""
    lacks: set[str] = field(default_factory=set[str])
    """Functions that it does not support."""


class NvmlLibrary:
    """The C functions, each under its name; handles are the numbers of the GPUs, from 1."""

    def __init__(self, *gpus: FakeGpu) -> None:
        self.gpus = gpus
        self.xids: queue.SimpleQueue[tuple[FakeGpu, int]] = queue.SimpleQueue()
        self.registered: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """Functions of later versions are not there, as in an old library."""
        raise AttributeError(name)

    def nvmlInitWithFlags(self, _: int) -> int:
        return OK

    def nvmlErrorString(self, number: int) -> bytes:
        return f"error {number}".encode()

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, handle: Any) -> int:
        for number, gpu in enumerate(self.gpus, 1):
            if gpu.uuid.encode() == uuid.value:
                _point(handle, number)
                return OK
        return _NOT_FOUND

    def nvmlDeviceGetIndex(self, handle: Any, index: Any) -> int:
        index._obj.value = _number(handle) - 1
        return OK

    def nvmlDeviceGetName(self, handle: Any, name: Any, _: Any) -> int:
        name.value = self._gpu(handle).name.encode()
        return OK

    def nvmlDeviceGetUUID(self, handle: Any, uuid: Any, _: Any) -> int:
        uuid.value = self._gpu(handle).uuid.encode()
        return OK

    def nvmlDeviceGetUtilizationRates(self, handle: Any, rates: Any) -> int:
        rates._obj.gpu = self._gpu(handle).busy_percent
        return self._answer(handle, "nvmlDeviceGetUtilizationRates")

    def nvmlDeviceGetMemoryInfo_v2(self, handle: Any, memory: Any) -> int:
        gpu, told = self._gpu(handle), memory._obj
        told.total, told.reserved = gpu.total_mib * _MIB, gpu.reserved_mib * _MIB
        told.used = gpu.used_mib * _MIB
        told.free = told.total - told.reserved - told.used
        return self._answer(handle, "nvmlDeviceGetMemoryInfo_v2")

    def nvmlDeviceGetPowerUsage(self, handle: Any, power: Any) -> int:
        power._obj.value = self._gpu(handle).power_mw
        return self._answer(handle, "nvmlDeviceGetPowerUsage")

    def nvmlDeviceGetTemperature(self, handle: Any, _: Any, temperature: Any) -> int:
        temperature._obj.value = self._gpu(handle).temperature_c
        return self._answer(handle, "nvmlDeviceGetTemperature")

    def nvmlDeviceGetFieldValues(self, handle: Any, _: Any, values: Any) -> int:
        [value] = values._obj
        assert value.fieldId == pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
        value.value.uiVal = self._gpu(handle).recovery
        value.nvmlReturn = self._answer(handle, "recovery")
        return self._gpu(handle).error

    def nvmlEventSetCreate(self, events: Any) -> int:
        _point(events, 99)
        return OK

    def nvmlDeviceRegisterEvents(self, handle: Any, kinds: Any, _: Any) -> int:
        assert kinds.value == pynvml.nvmlEventTypeXidCriticalError
        self.registered.append(self._gpu(handle).uuid)
        return self._answer(handle, "nvmlDeviceRegisterEvents")

    def nvmlEventSetWait_v2(self, _: Any, event: Any, timeout_ms: Any) -> int:
        try:
            gpu, xid = self.xids.get(timeout=timeout_ms.value / 1000)
        except queue.Empty:
            return _TIMEOUT
        told = event._obj
        told.eventType, told.eventData = pynvml.nvmlEventTypeXidCriticalError, xid
        _point(ctypes.byref(told.device), self.gpus.index(gpu) + 1)
        return OK

    def _gpu(self, handle: Any) -> FakeGpu:
        return self.gpus[_number(handle) - 1]

    def _answer(self, handle: Any, name: str) -> int:
        gpu = self._gpu(handle)
        return _NOT_SUPPORTED if name in gpu.lacks else gpu.error


class Card:
    """A device as an engine knows it."""

    name = "NVIDIA H100 80GB HBM3"
    total_bytes = 85_000_000_000

    def __init__(self, *uuids: str) -> None:
        self.uuids = uuids
        self.has = DeviceMemory(10, 20, 30)

    def memory(self) -> DeviceMemory:
        return self.has


def install(monkeypatch: pytest.MonkeyPatch, library: NvmlLibrary) -> None:
    """Have the bindings find ``library`` where they would load the driver's."""
    monkeypatch.setattr(pynvml, "nvmlLib", library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})


def _number(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _point(handle: Any, number: int) -> None:
    ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = ctypes.c_void_p(number)
