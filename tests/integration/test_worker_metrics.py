"""A worker's own figures, as Prometheus reads them while it works."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common.broker import Broker, connect
from common.models.simulated import SIMULATED_MODEL
from tests.support.expositions import Figures, complaints, figures_in
from tests.support.generations import admit
from tests.support.processes import Process, Processes, free_port, processes
from tests.support.waiting import wait_until

VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_inference_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_max_num_generation_tokens_bucket",
    "vllm:request_params_max_tokens_bucket",
    "vllm:iteration_tokens_total_bucket",
    "vllm:lora_requests_info",
    "vllm:corrupted_requests_total",
}
TGI = {
    "tgi_batch_current_size",
    "tgi_batch_current_max_tokens",
    "tgi_batch_next_size_bucket",
    "tgi_batch_inference_count",
    "tgi_batch_inference_success",
    "tgi_batch_inference_failure",
    "tgi_batch_concat",
    *(f"tgi_batch_{part}_duration_bucket"
      for part in ("inference", "forward", "decode", "filter", "concat")),
}  # fmt: skip
OLD = {
    "vllm:gpu_cache_usage_perc",
    "vllm:gpu_prefix_cache_queries_total",
    "vllm:gpu_prefix_cache_hits_total",
    "vllm:time_per_output_token_seconds_bucket",
}


@pytest.fixture
def started(redis_url: str, tmp_path: Path) -> Iterator[Processes]:
    with processes(redis_url, tmp_path) as started:
        yield started


async def text_of(process: Process, path: str = "/metrics") -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.get(process.url + path)


async def worked(started: Processes, worker: Process, num: int = 2) -> Figures:
    """What it shows when ``num`` generations have ended."""
    broker = Broker(connect(started.redis_url), SIMULATED_MODEL)
    for _ in range(num):
        await admit(broker, prompt_tokens=40, max_new_tokens=8)
    await broker.close()
    seen: list[Figures] = []

    async def have_ended() -> bool:
        seen.append(figures_in((await text_of(worker)).text))
        return seen[-1].total("vllm:request_success_total") == num

    await wait_until(have_ended, what="the end of all generations")
    return seen[-1]


async def test_it_shows_all_that_vllm_and_tgi_do(started: Processes) -> None:
    worker = await started.worker(metrics_port=free_port()).ready()
    figures = await worked(started, worker)
    assert figures.names() >= VLLM | TGI
    assert not figures.names() & OLD
    model = {"model_name": SIMULATED_MODEL, "engine": "0"}
    assert figures.get("vllm:request_success_total", finished_reason="length", **model) == 2
    assert figures.get("vllm:generation_tokens_total", **model) == 16
    assert figures.get("vllm:prompt_tokens_total", **model) == 80
    assert figures.get("vllm:request_generation_tokens_sum", **model) == 16
    assert figures.get("vllm:inter_token_latency_seconds_count", **model) == 14
    assert figures.get("vllm:time_to_first_token_seconds_count", **model) == 2
    assert figures.total("vllm:cache_config_info", block_size="16", num_gpu_blocks="4096") == 1
    assert figures.total("tgi_batch_inference_count", method="decode") >= 7
    assert figures.total("headrace_batch_size_count") == figures.total("headrace_steps_total")
    assert figures.total("headrace_model_load_seconds") > 0
    assert figures.total("process_resident_memory_bytes") > 10_000_000
    assert figures.total("headrace_build_info") == 1


async def test_names_that_vllm_has_given_up_are_there_for_who_asks(started: Processes) -> None:
    worker = started.worker(metrics_port=free_port(), metrics_compat='["vllm-0.10"]')
    figures = await worked(started, await worker.ready(), 1)
    assert figures.names() >= VLLM | OLD
    assert not figures.names() & TGI


async def test_a_port_that_is_taken_costs_the_figures_alone(started: Processes) -> None:
    first = await started.worker(metrics_port=free_port()).ready()
    second = await started.worker(metrics_port=first.url.rpartition(":")[2]).ready()
    assert second.events("metrics.unavailable")[0]["url"] == f"{first.url}/metrics"


async def test_nothing_but_figures_is_at_that_port(started: Processes) -> None:
    background = await started.background(metrics_port=free_port()).ready()
    assert (await text_of(background, "/")).status_code == 404
    answer = await text_of(background)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert figures_in(answer.text).total("process_resident_memory_bytes") > 10_000_000
    assert complaints(answer.text) == []


async def test_what_is_shown_is_as_prometheus_wants_it(started: Processes) -> None:
    """``promtool check metrics`` finds nothing to complain of but peers' own names."""
    worker = await started.worker(metrics_port=free_port()).ready()
    await worked(started, worker, 1)
    assert complaints((await text_of(worker)).text) == []
