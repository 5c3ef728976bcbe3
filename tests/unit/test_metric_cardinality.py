"""No flood of models, versions, APIs or codes makes more series than Prometheus should hold."""

import uuid
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from common.broker import Census, CountedLane, CountedWorker, DeadLetters, Memory, WorkerPresence
from common.failures import KINDS
from common.messages import LANES, Lane, Timing
from common.metrics import GatewayMetrics
from common.request_metrics import RequestEnd
from common.settings import Compat
from common.watching import Look
from ops.pool_metrics import PoolMetrics
from tests.support.nvml_library import Card, FakeGpu, NvmlLibrary, install
from workers.device_watch import DeviceWatch
from workers.figures import Figures
from workers.metrics import Served, WorkerMetrics
from workers.nvml import Nvml

MOST = 3000
"""Per process (the budget of the specification)."""
ALL: tuple[Compat, ...] = ("vllm-current", "vllm-0.10", "tgi")


def flooded_gateway() -> GatewayMetrics:
    metrics = GatewayMetrics(model="m", model_version="m@1", max_tokens=131_072, compat=ALL)
    for number in range(20_000):
        version = f"m@{number}"
        timing = Timing(0, 10, 20, 30, 1, 0, version, "w", LANES[number % len(LANES)])
        metrics.requests.note_end(
            RequestEnd(
                api=f"api-{number % 40}",
                code=sorted(KINDS)[number % len(KINDS)],
                lane=timing.lane,
                tenant_class="batch",
                validate_s=0.1,
                timing=timing,
            )
        )
        metrics.requests.note_first_token(0.1, version)
        metrics.requests.inter_token_s.labels(f"api-{number}").observe(0.1)
        metrics.resumes.labels(sorted(KINDS)[number % len(KINDS)]).inc()
    return metrics


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceWatch]:
    """Sixteen GPUs, as many as a host has."""
    gpus = [FakeGpu(f"GPU-{uuid.uuid4()}") for _ in range(16)]
    install(monkeypatch, NvmlLibrary(*gpus))
    uuids = [gpu.uuid for gpu in gpus]
    watch = DeviceWatch(Card(*uuids), Nvml(uuids), "w1", lambda _: None)
    yield watch
    watch.stop()


def worker(device: DeviceWatch) -> WorkerMetrics:
    return WorkerMetrics(
        Served("m", "m@1", "w1"),
        Figures(max_tokens=131_072, device=device),
        ALL,
        num_held=lambda: 0,
        adapters=lambda: {f"a{number}@1" for number in range(5000)},
    )


def large_pool() -> PoolMetrics:
    workers = [
        CountedWorker(f"w{number}", 5000, 10, 32, "", WorkerPresence("m@1", 1000))
        for number in range(1000)
    ]
    lanes: dict[Lane, CountedLane] = {lane: CountedLane(1, 1, 1, 1) for lane in LANES}
    metrics = PoolMetrics("m", ALL)
    census = Census(0, workers, [], lanes, 0, [], 1.0)
    metrics.note(Look(census, Memory(1, 2, False, 0), 0.001, dead=DeadLetters({}, 0)), True)
    return metrics


@pytest.fixture
def registries(device: DeviceWatch) -> dict[str, CollectorRegistry]:
    return {
        "gateway": flooded_gateway().registry,
        "worker": worker(device).registry,
        "exporter": large_pool().registry,
    }


def families_of(registry: CollectorRegistry) -> list[Metric]:
    return list(registry.collect())


def test_no_process_has_more_series_than_it_may(registries: dict[str, CollectorRegistry]) -> None:
    for name, registry in registries.items():
        num_series = sum(len(family.samples) for family in families_of(registry))
        assert num_series < MOST, f"{name} has {num_series}"


def test_what_comes_on_top_is_still_counted() -> None:
    families = families_of(flooded_gateway().registry)
    [requests] = [it for it in families if it.name == "headrace_requests_total"]
    assert sum(sample.value for sample in requests.samples) == 20_000
    assert any(sample.labels["code"] == "other" for sample in requests.samples)


def test_no_label_could_name_a_tenant_a_request_or_a_prompt(
    registries: dict[str, CollectorRegistry],
) -> None:
    labels = {
        label
        for registry in registries.values()
        for family in families_of(registry)
        for sample in family.samples
        for label in sample.labels
    }
    assert labels <= {
        "Hostname", "UUID", "api", "block_size", "cause", "code", "device", "dtype", "engine",
        "err", "finished_reason", "generation", "git_sha", "gpu", "implementation", "kind", "lane",
        "le", "major", "max_lora", "method", "minor", "model", "modelName", "model_name",
        "model_version", "num_gpu_blocks", "outcome",
        "patchlevel", "phase", "quant", "reason", "result", "revision", "running_lora_adapters",
        "sleep_state", "source", "state", "tenant_class", "version", "waiting_lora_adapters",
        "weights_sha256", "worker",
    }  # fmt: skip
