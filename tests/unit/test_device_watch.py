"""What is told of a GPU is what its driver says, by one process, and a fault ends what it must."""

import json
import re
import sys
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pynvml
import pytest

from tests.support.event_schema import captured_logs
from tests.support.expositions import complaints, figures_in
from tests.support.nvml_library import Card, FakeGpu, NvmlLibrary, install
from tests.support.processes import ROOT
from tests.support.waiting import wait_until
from workers.device_watch import DeviceWatch, watch_device
from workers.engine.port import DeviceFaultError
from workers.figures import Figures
from workers.metrics import Served, WorkerMetrics
from workers.nvml import Nvml, UnwatchedError, Xid


@pytest.fixture
def gpus() -> list[FakeGpu]:
    """Of their own for each test: who tells of one is settled between all processes here."""
    return [FakeGpu(f"GPU-{uuid.uuid4()}") for _ in range(2)]


@pytest.fixture
def library(gpus: list[FakeGpu], monkeypatch: pytest.MonkeyPatch) -> NvmlLibrary:
    library = NvmlLibrary(*gpus)
    install(monkeypatch, library)
    return library


class Watches:
    """Those of a test, and what they gave up."""

    def __init__(self, gpus: list[FakeGpu]) -> None:
        self.gpus = gpus
        self.lost: list[DeviceFaultError] = []
        self.all: list[DeviceWatch] = []

    def open(self, *uuids: str) -> DeviceWatch:
        """Not started: it looks when the test says so."""
        uuids = uuids or tuple(gpu.uuid for gpu in self.gpus)
        self.all.append(DeviceWatch(Card(*uuids), Nvml(uuids), "w1", self.lost.append))
        return self.all[-1]


@pytest.fixture
def watches(library: NvmlLibrary, gpus: list[FakeGpu]) -> Iterator[Watches]:
    opened = Watches(gpus)
    yield opened
    for watch in opened.all:
        watch.stop()


def metrics_of(watch: DeviceWatch) -> str:
    figures = Figures(device=watch)
    served = Served("m", "m@1", "w1")
    return WorkerMetrics(served, figures, (), num_held=lambda: 0, adapters=set[str]).text().decode()


def test_figures_have_the_names_units_and_labels_of_the_dcgm_exporter(
    watches: Watches, gpus: list[FakeGpu]
) -> None:
    gpus[1].busy_percent = 7
    watch = watches.open()
    watch.note(Xid(gpus[1].uuid, 31))
    text = metrics_of(watch)
    figures = figures_in(text)
    first = {"gpu": "0", "UUID": gpus[0].uuid, "device": "nvidia0", "modelName": gpus[0].name}
    second = {"gpu": "1", "UUID": gpus[1].uuid, "device": "nvidia1"}
    assert figures.get("DCGM_FI_DEV_GPU_UTIL", **first) == 93
    assert figures.get("DCGM_FI_DEV_GPU_UTIL", **second) == 7
    assert figures.get("DCGM_FI_DEV_FB_USED", **first) == 61_000
    assert figures.get("DCGM_FI_DEV_FB_FREE", **first) == 81_559 - 600 - 61_000
    assert figures.get("DCGM_FI_DEV_POWER_USAGE", **first) == 412.345
    assert figures.get("DCGM_FI_DEV_GPU_TEMP", **first) == 58
    assert figures.get("DCGM_FI_DEV_XID_ERRORS", **first) == 0
    assert figures.get("DCGM_FI_DEV_XID_ERRORS", **second) == 31
    taken = {kind: figures.get("headrace_worker_memory_bytes", kind=f"gpu_{kind}")
             for kind in ("allocated", "reserved", "peak")}  # fmt: skip
    assert taken == {"allocated": 10, "reserved": 20, "peak": 30}
    assert complaints(text) == []


def test_our_dashboards_ask_for_what_is_told(watches: Watches) -> None:
    """Name by name and label by label."""
    told = {
        sample.name: set(sample.labels) for sample in figures_in(metrics_of(watches.open())).samples
    }
    board = json.loads((ROOT / "ops" / "grafana" / "workers.json").read_text())
    targets = [target for panel in board["panels"] for target in panel.get("targets", [])]
    asked = [it for it in targets if "DCGM_" in it["expr"]]
    assert len(asked) >= 3
    for target in asked:
        [name] = re.findall(r"DCGM_\w+", target["expr"])
        [labels] = re.findall(r"by \(([^)]*)\)", target["expr"])
        assert set(labels.split(", ")) <= told[name]
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set(labels.split(", "))


def test_of_several_workers_on_a_gpu_one_tells_of_it(watches: Watches) -> None:
    """Else every sum would count it twice. When that one ends, another takes over."""
    first, second = watches.open(), watches.open()
    assert (len(first.gpus), len(second.gpus)) == (2, 0)
    assert "DCGM_" not in metrics_of(second)
    assert 'kind="gpu_reserved"' in metrics_of(second)
    first.stop()
    second.look()
    assert len(second.gpus) == 2


def test_what_a_gpu_does_not_tell_is_left_out(watches: Watches, gpus: list[FakeGpu]) -> None:
    gpus[0].lacks |= {"nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage", "recovery"}
    names = figures_in(metrics_of(watches.open(gpus[0].uuid))).names()
    assert names >= {"DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_GPU_TEMP"}
    assert not names & {"DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_POWER_USAGE"}
    assert watches.lost == []


@pytest.mark.parametrize(
    ("xid", "action", "is_fault"),
    [
        *((xid, "restart_app", False) for xid in (8, 13, 31, 43, 45)),
        *((xid, "reset_gpu", True) for xid in (46, 48, 64, 95, 119)),
        *((xid, "contact_support", True) for xid in (74, 79)),
        (63, "unknown", False),
    ],
)
def test_each_xid_is_told_and_only_a_fault_of_the_gpu_gives_it_up(
    watches: Watches, gpus: list[FakeGpu], xid: int, action: str, *, is_fault: bool
) -> None:
    """What hits one process may have been somebody else's."""
    watch = watches.open()
    with captured_logs() as lines:
        watch.note(Xid(gpus[0].uuid, xid))
        watch.note(Xid(gpus[0].uuid, xid))
    assert [(line["event"], line["xid"], line["action"]) for line in lines] == [
        ("device.fault", xid, action)
    ] * 2
    assert {line["log_level"] for line in lines} == {"error" if is_fault else "warning"}
    assert [error.code for error in watches.lost] == ["GPU_HW_FAULT"] * is_fault


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"recovery": pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET}, "reset"),
        ({"recovery": pynvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT}, "reboot"),
        ({"recovery": pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_P2P}, ""),
        ({"error": pynvml.NVML_ERROR_GPU_IS_LOST}, "reboot"),
        ({"error": pynvml.NVML_ERROR_RESET_REQUIRED}, "reset"),
        ({"error": pynvml.NVML_ERROR_UNKNOWN}, ""),
    ],
)
def test_a_gpu_that_must_be_reset_is_not_used_before(
    watches: Watches, gpus: list[FakeGpu], changes: dict[str, int], word: str
) -> None:
    """Whoever comes later has seen no Xid; the driver still knows. Said once."""
    watch = watches.open()
    for name, value in changes.items():
        setattr(gpus[1], name, value)
    watch.look()
    watch.look()
    assert [gpus[1].uuid in str(error) and f"needs a {word}" in str(error)
            for error in watches.lost] == [True] * bool(word)  # fmt: skip


async def test_a_fault_is_heard_at_once_and_by_the_right_gpu(
    watches: Watches, library: NvmlLibrary, gpus: list[FakeGpu]
) -> None:
    watch = watches.open()
    watch.start()
    library.xids.put((gpus[1], 13))
    library.xids.put((gpus[1], 79))
    await wait_until(lambda: watches.lost, what="the fault")
    assert watch.xids == {gpus[1].uuid: 79}
    assert library.registered == [gpu.uuid for gpu in gpus]


async def test_it_looks_again_and_again_until_it_is_stopped(
    watches: Watches, gpus: list[FakeGpu]
) -> None:
    watch = watches.open(gpus[0].uuid)
    watch.start()
    gpus[0].busy_percent = 11
    await wait_until(lambda: watch.gpus[0].busy_percent == 11, what="another look")
    watch.stop()
    await wait_until(
        lambda: all(it.name != "device" for it in threading.enumerate()), what="its end"
    )


def test_without_bindings_or_driver_torch_alone_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing breaks; the log says why."""

    def opened() -> tuple[DeviceWatch | None, list[dict[str, Any]]]:
        with captured_logs() as lines:
            watch = watch_device(Card("GPU-nobody"), "w1", lambda _: None)
        if watch is not None:
            watch.stop()
        return watch, lines

    watch, [line] = opened()
    assert line["event"] == "device.found"
    assert line["unwatched_reason"].startswith("NVML: ")
    assert watch is not None
    assert (watch.gpus, watch.memory.peak_bytes) == ([], 30)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    _, [line] = opened()
    assert "not installed" in line["unwatched_reason"]
    assert watch_device(None, "w1", lambda _: None) is None


def test_bindings_that_are_too_old_are_no_reason_to_fail(
    library: NvmlLibrary, gpus: list[FakeGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pynvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION")
    with pytest.raises(UnwatchedError, match="too old"):
        Nvml([gpus[0].uuid])
