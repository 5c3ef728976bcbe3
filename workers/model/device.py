"""The GPU that an engine computes on, as torch knows it: its name, and what is taken of its memory.

torch's own allocator is asked, never the device: a device that hangs holds nobody up who asks.
"""

from collections.abc import Sequence

import torch

from workers.engine.port import DeviceMemory


def device_of(device: torch.device, num_ranks: int = 1) -> "CudaDevice | None":
    """The device, or with ``num_ranks`` above 1 the first so many; None for a processor."""
    if device.type != "cuda":
        return None
    first = torch.empty(0, device=device).get_device()  # of "cuda" alone, too
    return CudaDevice(range(first, first + num_ranks))


class CudaDevice:
    """Implements :class:`workers.engine.port.Device`.

    Args:
        indices: as torch counts devices, which need not be as the driver does.
    """

    def __init__(self, indices: Sequence[int]) -> None:
        known = [torch.cuda.get_device_properties(index) for index in indices]
        self.uuids = tuple(f"GPU-{properties.uuid}" for properties in known)
        self.name: str = known[0].name
        self.total_bytes: int = known[0].total_memory
        self._index = indices[0]

    def memory(self) -> DeviceMemory:
        told = torch.cuda.memory_stats(self._index)
        return DeviceMemory(
            allocated_bytes=told.get("allocated_bytes.all.current", 0),
            reserved_bytes=told.get("reserved_bytes.all.current", 0),
            peak_bytes=told.get("allocated_bytes.all.peak", 0),
        )
