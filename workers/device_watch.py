"""Looks after a worker's GPU: once a second, in a thread of its own, and at each fault at once.

Everybody else reads what it saw last, so a driver that hangs with its device holds up nobody.
"""

import socket
import threading
from collections.abc import Callable

from common.clock import monotonic_s
from common.logs import get_logger
from workers.engine.port import Device, DeviceFaultError, DeviceMemory
from workers.nvml import GpuDriver, GpuFigures, Nvml, UnwatchedError, Xid

log = get_logger()

_LOOK_S = 1.0


def watch_device(
    device: Device | None, worker: str, on_fault: Callable[[DeviceFaultError], None]
) -> "DeviceWatch | None":
    """Begin to watch the device of an engine; None: it has none.

    ``on_fault`` is called from the thread, once the driver says that the device is of no use.
    """
    if device is None:
        return None
    driver, unwatched_reason = None, None
    try:
        driver = Nvml(device.uuids)
    except UnwatchedError as error:
        unwatched_reason = str(error)
    log.info(
        "device.found",
        worker=worker,
        device=device.name,
        gpu_uuid=device.uuids[0],
        gpu_mem_total_bytes=device.total_bytes,
        unwatched_reason=unwatched_reason,
    )
    watch = DeviceWatch(device, driver, worker, on_fault)
    watch.start()
    return watch


class DeviceWatch:
    """What was seen last. ``driver`` is None where nobody can be asked but torch."""

    def __init__(
        self,
        device: Device,
        driver: GpuDriver | None,
        worker: str,
        on_fault: Callable[[DeviceFaultError], None],
    ) -> None:
        self.uuid = device.uuids[0]
        self.total_bytes = device.total_bytes
        self.memory = DeviceMemory()
        self.gpus: list[GpuFigures] = []
        """Those of them that this process tells of; see :class:`_Voice`."""
        self.xids: dict[str, int] = {}
        """The last one of each GPU since this began; none yet: 0 for all."""
        self._device = device
        self._driver = driver
        self._worker = worker
        self._on_fault = on_fault
        self._is_lost = False
        self._voices = {uuid: _Voice(uuid) for uuid in device.uuids}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="device", daemon=True)
        self.look()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """It ends within a second, and is not waited for: its driver may hang."""
        self._stopping.set()
        if not self._thread.is_alive():
            self._fall_silent()

    def look(self) -> None:
        """Take down how things are now."""
        self.memory = self._device.memory()
        seen = self._driver.look() if self._driver else []
        for figures in seen:
            if figures.remedy:
                self._lose(f"GPU {figures.gpu.uuid} needs a {figures.remedy}, says its driver.")
        self.gpus = [figures for figures in seen if self._voices[figures.gpu.uuid].is_ours()]

    def note(self, xid: Xid) -> None:
        """The driver has reported it just now."""
        self.xids[xid.uuid] = xid.number
        write = log.error if xid.is_fault else log.warning
        write(
            "device.fault",
            worker=self._worker,
            gpu_uuid=xid.uuid,
            xid=xid.number,
            action=xid.action,
        )
        if xid.is_fault:
            self._lose(f"GPU {xid.uuid}: Xid {xid.number} ({xid.action}).")

    def _keep_looking(self) -> None:
        while not self._stopping.is_set():
            self.look()
            self._listen_until(monotonic_s() + _LOOK_S)
        self._fall_silent()

    def _listen_until(self, due_s: float) -> None:
        while not self._stopping.is_set() and (left_s := due_s - monotonic_s()) > 0:
            xid = self._driver.next_xid(left_s) if self._driver else None
            if xid is not None:
                self.note(xid)
            else:  # in time, or at once where errors are not told
                self._stopping.wait(max(0.0, due_s - monotonic_s()))

    def _fall_silent(self) -> None:
        for voice in self._voices.values():
            voice.release()

    def _lose(self, reason: str) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._on_fault(DeviceFaultError(reason))


class _Voice:
    """The right to tell Prometheus of a GPU: several workers may share one, and a series has one
    source. On each host one process has it; the kernel gives it back when that process ends.
    """

    def __init__(self, uuid: str) -> None:
        self._name = f"\0headrace.gpu.{uuid}"  # abstract: no file that could stay behind
        self._held: socket.socket | None = None

    def is_ours(self) -> bool:
        """Takes it where it is free."""
        if self._held is None:
            end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                end.bind(self._name)
            except OSError:
                end.close()
            else:
                self._held = end
        return self._held is not None

    def release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None
