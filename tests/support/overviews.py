"""Overviews of a pool as tests need them: healthy and busy, unless they say otherwise."""

from typing import Any

import msgspec

from common.overview import (
    ErrorCount,
    GatewayView,
    LaneView,
    Latency,
    Overview,
    Quantiles,
    RedisView,
    Requests,
    Stats,
    WorkerView,
)

AT = 1_700_000_000.0


def worker_view(name: str = "w0", **changes: Any) -> WorkerView:
    """One with eight generations, each of which gets five tokens a second."""
    usual = WorkerView(
        name=name,
        host="host-a",
        model_version="m@1",
        batch_size=8.0,
        max_batch_size=32,
        kv_used=0.25,
        tokens_per_second=40.0,
        rss_bytes=10**9,
        heartbeat_age_s=0.5,
        held=8,
        up_s=3600.0,
    )
    return msgspec.structs.replace(usual, **changes)


def overview(**changes: Any) -> Overview:
    """Three workers, one gateway, a few who wait and one caller's mistake."""
    stats = Stats(
        queue_time=0.2,
        generation_time=3.0,
        tokens_per_second=120.0,
        error_rate=0.0,
        model_version="m@1",
        over_s=60.0,
    )
    usual = Overview(
        at=AT,
        model="m",
        model_version="m@1",
        stats=stats,
        stats_5m=msgspec.structs.replace(stats, over_s=300.0),
        stats_1h=msgspec.structs.replace(stats, over_s=3600.0, error_rate=0.001),
        requests=Requests(per_s=8.0, running=24, ok=480, failed=1),
        lanes=[LaneView(lane="default", depth=3, backlog_tokens=600, est_wait_s=0.4)],
        workers=[worker_view(f"w{number}") for number in range(3)],
        gateways=[GatewayView(name="g0", streams=24, relay_lag_p99_s=0.004, loop_lag_s=0.002)],
        latency=Latency(
            ttft=Quantiles(p50=0.3, p99=0.9), inter_token=Quantiles(p50=0.02, p99=0.05)
        ),
        errors=[ErrorCount(code="BAD_REQUEST", count_1m=1, total=4)],
        streams=24,
        redis=RedisView(used_bytes=10**8, max_bytes=10**9, rtt_s=0.0002),
    )
    return msgspec.structs.replace(usual, **changes)
