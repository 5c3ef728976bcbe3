"""Spans for a collector: one trace leads from the caller through gateway and queue to workers."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from common.models.store import ModelStore
from common.settings import GatewaySettings, first_error
from tests.support.collector import Collector, collector
from tests.support.processes import Processes, processes

CALLER = ("a1" * 16, "b2" * 8)
SECRET = "the prompt that stays where it is"
BODY = {"inputs": SECRET, "parameters": {"max_new_tokens": 60, "details": True}}


@pytest.fixture
def seen() -> Iterator[Collector]:
    with collector() as seen:
        yield seen


@pytest.fixture
def started(redis_url: str, tmp_path: Path) -> Iterator[Processes]:
    ModelStore(tmp_path / "data").add_simulated()
    with processes(redis_url, tmp_path) as started:
        yield started


async def test_one_trace_links_gateway_queue_and_both_workers(
    started: Processes, seen: Collector
) -> None:
    """A worker that is told to stop hands over; who goes on stands in the same trace."""
    told: dict[str, Any] = {"otlp_endpoint": seen.url, "otlp_service_name": "mill", "drain_s": 0}
    gateway = await started.gateway(model="simulated", otlp_endpoint=seen.url).ready()
    first = await started.worker(**told, simulated_inter_token_ms=200).ready()
    headers = {"traceparent": f"00-{CALLER[0]}-{CALLER[1]}-01"}
    async with (
        httpx.AsyncClient(base_url=gateway.url, timeout=30) as client,
        client.stream("POST", "/generate_stream", json=BODY, headers=headers) as answer,
    ):
        events = answer.aiter_lines()
        await anext(events)
        second = await started.worker(**told).ready()
        first.terminate()
        assert await first.ended() == 0
        text = "".join([line async for line in events])
    assert '"finish_reason"' in text
    for process in (gateway, second):
        process.terminate()
        assert await process.ended() == 0

    assert {span.trace_id for span in seen.spans} == {CALLER[0]}
    [server], [sent] = seen.named("POST /generate_stream"), seen.named("send simulated")
    [queue], attempts = seen.named("queue simulated"), seen.named("process simulated")
    assert (server.kind, server.parent_id) == ("SERVER", CALLER[1])
    assert (sent.kind, sent.parent_id) == ("PRODUCER", server.span_id)
    assert (queue.kind, queue.parent_id) == ("INTERNAL", sent.span_id)
    assert [span.kind for span in attempts] == ["CONSUMER", "CONSUMER"]
    assert {span.parent_id for span in attempts} == {sent.span_id}
    assert {tuple(span.linked) for span in attempts} == {((CALLER[0], sent.span_id),)}
    assert [span.attributes["headrace.attempt"] for span in attempts] == [1, 2]
    assert server.began_s <= sent.began_s <= queue.ended_s + 0.05
    assert attempts[0].ended_s <= attempts[1].ended_s <= server.ended_s + 0.05

    ended = attempts[1].attributes
    assert ended["gen_ai.usage.output_tokens"] == server.attributes["gen_ai.usage.output_tokens"]
    assert server.attributes["gen_ai.operation.name"] == "text_completion"
    assert server.attributes["http.response.status_code"] == 200
    assert attempts[0].resource["service.name"] == "mill"
    assert SECRET.encode() not in seen.raw

    # The ids of the spans are those of the log.
    claimed = [worker.events("worker.claimed")[0] for worker in (first, second)]
    assert [line["span_id"] for line in claimed] == [span.span_id for span in attempts]
    [finished] = gateway.events("request.finished")
    assert (finished["trace_id"], finished["span_id"]) == (CALLER[0], server.span_id)


async def test_a_collector_that_is_away_costs_nobody_an_answer(
    started: Processes, seen: Collector
) -> None:
    """Spans are lost, requests are not, and the process ends in time."""
    nobody = "http://127.0.0.1:9"
    gateway = await started.gateway(model="simulated", otlp_endpoint=nobody).ready()
    worker = await started.worker(otlp_endpoint=nobody).ready()
    async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as client:
        answer = await client.post("/generate", json=BODY)
    assert answer.status_code == 200
    for process in (gateway, worker):
        process.terminate()
        assert await process.ended() == 0


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "http://"])
def test_an_endpoint_that_is_none_is_named(endpoint: str) -> None:
    with pytest.raises(ValidationError) as raised:
        GatewaySettings(otlp_endpoint=endpoint)
    assert "otlp_endpoint must be an http:// or https:// URL" in first_error(raised.value)


def test_nothing_of_it_is_loaded_without_an_endpoint() -> None:
    code = "import sys, gateway.app, common.spans; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
