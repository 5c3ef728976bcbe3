"""Which GPU it is and what is taken of it, in torch's words and the driver's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from workers.engine.port import DeviceMemory
from workers.model.device import CudaDevice, device_of


def test_a_gpu_is_named_as_its_driver_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch leaves out the prefix; memory is that of the first of several."""

    def properties(index: int) -> Any:
        uuid = f"0c5f00de-0000-4000-8000-{index:012d}"
        return SimpleNamespace(uuid=uuid, name="H", total_memory=80 + index)

    def stats(index: int) -> dict[str, int]:
        kinds = {"allocated_bytes.all.current": 1, "allocated_bytes.all.peak": 3}
        return kinds | {"reserved_bytes.all.current": 2} if index == 2 else {}

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    device = CudaDevice(range(2, 4))
    assert device.uuids == tuple(f"GPU-0c5f00de-0000-4000-8000-{n:012d}" for n in (2, 3))
    assert (device.name, device.total_bytes) == ("H", 82)
    assert device.memory() == DeviceMemory(1, 2, 3)
    assert CudaDevice([3]).memory() == DeviceMemory()


def test_a_processor_is_no_device_to_watch() -> None:
    assert device_of(torch.device("cpu")) is None
