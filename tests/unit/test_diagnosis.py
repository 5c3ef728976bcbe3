"""From overviews to plain words: each case is told, with its command, and a busy pool is left
alone.
"""

import random
from collections.abc import Callable
from typing import Any

import click
import msgspec
import pytest

from common.diagnosis import Diagnoser, well, without_gateway, without_news, without_redis
from common.overview import (
    Diagnosis,
    ErrorCount,
    LaneView,
    Loss,
    Overview,
    RedisView,
    Stats,
)
from ops.cli import cli
from tests.support.overviews import AT, overview, worker_view

Changes = dict[str, Any]
NO_CODE_OF_OURS = "BAD_REQUEST"


def told_after(seconds: int, changes: Callable[[int], Changes]) -> list[Diagnosis]:
    """What is told at the end of so many seconds, each changed as ``changes`` says."""
    diagnoser = Diagnoser()
    told: list[Diagnosis] = []
    for second in range(seconds):
        told = diagnoser.look(overview(at=AT + second, **changes(second)))
    return told


def always(**changes: Any) -> Callable[[int], Changes]:
    return lambda _: changes


def stats(error_rate: float, over_s: float = 60.0) -> Stats:
    return msgspec.structs.replace(overview().stats, error_rate=error_rate, over_s=over_s)


def lane(tokens: float, wait_s: float) -> list[LaneView]:
    return [LaneView(lane="default", depth=40, backlog_tokens=int(tokens), est_wait_s=wait_s)]


def queue_grows(second: int) -> Changes:
    return {"lanes": lane(1000 + 200 * second, 4 + second / 2)}


CASES: list[tuple[str, Callable[[int], Changes], str, str, str]] = [
    ("no_worker", always(workers=[]), "critical", "no worker", "headrace worker"),
    (
        "no_worker",
        always(workers=[worker_view("w5", state="drained", drain_cause="operator")]),
        "critical",
        "asked to rest",
        "headrace workers resume w5",
    ),
    (
        "no_worker",
        always(workers=[worker_view(state="loading")]),
        "warning",
        "being loaded",
        "headrace status",
    ),
    (
        "worker_lost",
        always(losses=[Loss(at=AT - 40, role="worker", name="w9", host="host-b")]),
        "warning",
        "worker died",
        "headrace incident report -o report.html",
    ),
    (
        "gateway_lost",
        always(losses=[Loss(at=AT - 40, role="gateway", name="g9")]),
        "warning",
        "gateway died",
        "headrace incident report -o report.html",
    ),
    ("queue_grows", queue_grows, "warning", "waits become longer", "headrace worker"),
    (
        "slow_worker",
        always(
            workers=[
                *(worker_view(f"w{number}") for number in range(3)),
                worker_view("w3", tokens_per_second=8.0, host="host-d"),
            ]
        ),
        "warning",
        "w3",
        "headrace workers drain w3",
    ),
    (
        "errors",
        always(
            stats=stats(0.08),
            errors=[
                ErrorCount(code="CUDA_OOM", count_1m=38, total=40),
                ErrorCount(code="ENGINE_ERROR", count_1m=2, total=2),
            ],
        ),
        "warning",
        "most of them with CUDA_OOM",
        "headrace explain CUDA_OOM",
    ),
    ("dead_letters", always(dead_letters=1), "warning", "set aside", "headrace dead list"),
    (
        "redis_memory",
        always(redis=RedisView(used_bytes=96, max_bytes=100)),
        "critical",
        "96 % full",
        "headrace doctor",
    ),
    (
        "redis_evicts",
        always(redis=RedisView(evicts=True, evicted_keys=3)),
        "critical",
        "throws away",
        "headrace doctor",
    ),
    (
        "durability",
        always(redis=RedisView(durability_gap="It keeps no append-only file")),
        "warning",
        "could be lost",
        "headrace doctor",
    ),
    (
        "versions",
        always(workers=[worker_view("w0"), worker_view("w1", model_version="m@2", up_s=20.0)]),
        "ok",
        "2 versions",
        "headrace status",
    ),
]


@pytest.mark.parametrize(("code", "changes", "severity", "words", "command"), CASES)
def test_each_case_is_told_with_its_command(
    code: str, changes: Callable[[int], Changes], severity: str, words: str, command: str
) -> None:
    [told] = told_after(45, changes)
    assert told.code == code
    assert told.severity == severity
    assert words in told.what
    assert told.command == command
    assert told.why.endswith(".")


BY_READERS = [without_news, without_redis, without_gateway]
"""What only who reads the overviews can tell."""
COMMANDS = {
    *(case[-1] for case in CASES),
    *(tells(overview(), 9.0).diagnosis[0].command for tells in BY_READERS),
    well(overview()).command,
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_each_command_that_is_named_exists(command: str) -> None:
    """With its arguments and options: somebody will copy it at night."""
    found: click.Command | None = cli
    program, *words = command.split()
    assert program == "headrace"
    while isinstance(found, click.Group):
        found = found.get_command(click.Context(found), words.pop(0))
    assert found is not None
    found.make_context(command, words)


def test_a_healthy_pool_is_told_to_be_well() -> None:
    [told] = told_after(60, always())
    assert (told.code, told.severity) == ("well", "ok")
    assert "3 workers" in told.why


def test_a_busy_pool_that_keeps_up_raises_no_alarm() -> None:
    """An hour of a full house: a queue that comes and goes, uneven workers, callers' mistakes, a
    rare failure.
    """
    drawn = random.Random(11)

    def busy(_: int) -> Changes:
        workers = [
            worker_view(
                f"w{number}",
                batch_size=drawn.uniform(20, 32),
                tokens_per_second=drawn.uniform(90, 160),
            )
            for number in range(6)
        ]
        return {
            "workers": workers,
            "lanes": lane(drawn.uniform(20_000, 30_000), drawn.uniform(2, 9)),
            "errors": [
                ErrorCount(code=NO_CODE_OF_OURS, count_1m=drawn.randrange(80), total=900),
                ErrorCount(code="QUEUE_TIMEOUT", count_1m=drawn.randrange(4), total=9),
            ],
            "stats": stats(drawn.uniform(0, 0.01)),
        }

    diagnoser = Diagnoser()
    for second in range(3600):
        told = diagnoser.look(overview(at=AT + second, **busy(second)))
        assert [found.code for found in told] == ["well"], second


def test_what_lasts_a_moment_is_not_told() -> None:
    def blip(second: int) -> Changes:
        return {"workers": []} if 20 <= second < 23 else {}

    assert [found.code for found in told_after(24, blip)] == ["well"]


def test_what_wavers_is_told_without_flickering() -> None:
    diagnoser = Diagnoser()
    banners: list[str] = []
    for second in range(60):
        redis = RedisView(used_bytes=90 if second < 10 or second % 3 else 80, max_bytes=100)
        banners.append(diagnoser.look(overview(at=AT + second, redis=redis))[0].code)
    assert banners[:5] == ["well"] * 5
    assert set(banners[5:]) == {"redis_memory"}
    calm = [diagnoser.look(overview(at=AT + 60 + second))[0].code for second in range(15)]
    assert calm[-1] == "well"


def test_the_worst_is_the_banner() -> None:
    told = told_after(
        30, always(workers=[], dead_letters=2, redis=RedisView(durability_gap="No file"))
    )
    assert [found.code for found in told] == ["no_worker", "dead_letters", "durability"]


def test_a_worker_that_was_replaced_is_told_so() -> None:
    losses = [Loss(at=AT + 10, role="worker", name="w9", cause="seen")]
    young = [worker_view("w0"), worker_view("w7", up_s=5.0)]
    [told] = told_after(45, always(losses=losses, workers=young))
    assert "w9 ended" in told.why
    assert "another one has taken its place" in told.why


def test_a_loss_of_long_ago_is_history() -> None:
    losses = [Loss(at=AT - 400, role="worker", name="w9")]
    assert [found.code for found in told_after(10, always(losses=losses))] == ["well"]


def test_failures_that_are_usual_are_not_news() -> None:
    changes = always(
        stats=stats(0.03),
        stats_1h=stats(0.02, over_s=3600.0),
        errors=[ErrorCount(code="CUDA_OOM", count_1m=15, total=900)],
    )
    assert [found.code for found in told_after(45, changes)] == ["well"]


def test_two_workers_of_unlike_batches_are_not_compared() -> None:
    """A full batch is slower for each of its answers, which is no fault."""
    workers = [
        *(worker_view(f"w{number}", batch_size=2.0, tokens_per_second=60.0) for number in range(3)),
        worker_view("w3", batch_size=32.0, tokens_per_second=200.0),
    ]
    assert [found.code for found in told_after(45, always(workers=workers))] == ["well"]


def test_readers_say_themselves_that_nobody_looks_or_redis_is_away() -> None:
    last: Overview = overview()
    stale, away = without_news(last, 12.0), without_redis(last, 7.0)
    assert [found.code for found in stale.diagnosis] == ["exporter_stale"]
    assert "12 s" in stale.diagnosis[0].why
    assert [found.code for found in away.diagnosis] == ["redis_away"]
    assert not away.redis.is_up
    assert away.workers == last.workers
    cut_off = without_gateway(last, 7.0)
    assert [found.code for found in cut_off.diagnosis] == ["gateway_away"]
