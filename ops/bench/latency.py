"""The latency that Headrace adds: from a request to the first byte of its answer's stream.

The engine is the simulated one at zero delay, so that what is left is the path: gateway, Redis,
claim, publish, relay. Requests come at random times of a set rate whether or not earlier ones have
been answered, as they do from many independent people; a slow answer therefore can not hide the
wait of those behind it.
"""

import asyncio
import contextlib
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import click
import msgspec
from rich.console import Console
from rich.table import Table

from common.clock import monotonic_s
from ops.bench.instance import own_instance

_ANSWER_TIMEOUT_S = 30.0
_WARM_UP_REQUESTS = 20
_SEED = 1


class Figures(msgspec.Struct, kw_only=True):
    """The result; all times in milliseconds. ``failed`` requests are in no other figure."""

    rate: float
    requests: int
    failed: int
    first_byte_p50_ms: float
    first_byte_p90_ms: float
    first_byte_p99_ms: float
    first_byte_max_ms: float
    whole_answer_p50_ms: float
    whole_answer_p90_ms: float
    whole_answer_p99_ms: float
    whole_answer_max_ms: float


@dataclass(frozen=True, slots=True)
class Answer:
    first_byte_s: float
    whole_s: float


@click.command()
@click.option("--url", default="", help="A running gateway; else one is started just for this.")
@click.option("--rate", default=20.0, show_default=True, help="Requests per second.")
@click.option("--seconds", default=20.0, show_default=True, help="Length of the measurement.")
@click.option("--max-new-tokens", default=8, show_default=True, help="Length of each answer.")
def latency(url: str, rate: float, seconds: float, max_new_tokens: int) -> None:
    """Time from a request to the first byte of its stream, with an engine that takes no time.

    Prints a table, and the same figures as one line of JSON.
    """
    with contextlib.nullcontext(url) if url else _own_instance() as address:
        figures = asyncio.run(measure(address, rate, seconds, max_new_tokens))
    _print(figures)


# --- the system under test


@contextlib.contextmanager
def _own_instance() -> Generator[str]:
    """`headrace up` with the simulated engine at zero delay, on a free port; gives its address."""
    delays = {
        "HEADRACE_SIMULATED_FIRST_TOKEN_MS": "0",
        "HEADRACE_SIMULATED_INTER_TOKEN_MS": "0",
    }
    with own_instance("--engine", "simulated", env=delays) as (_, addresses):
        yield addresses[0]


# --- the load


async def measure(url: str, rate: float, seconds: float, max_new_tokens: int) -> Figures:
    """Send requests for ``seconds`` and wait for their answers.

    Raises: click.ClickException when no request was answered.
    """
    request = _request(url, max_new_tokens)
    for _ in range(_WARM_UP_REQUESTS):
        await _ask(url, request)
    asked: list[asyncio.Task[Answer | None]] = []
    chance = random.Random(_SEED)
    start_s = monotonic_s()
    next_s = start_s
    while next_s < start_s + seconds:
        await asyncio.sleep(max(0.0, next_s - monotonic_s()))
        asked.append(asyncio.create_task(_ask(url, request)))
        next_s += chance.expovariate(rate)
    return summarise(rate, await asyncio.gather(*asked))


async def _ask(url: str, request: bytes) -> Answer | None:
    """One request on a connection of its own; None when it failed."""
    target = urlsplit(url)
    start_s = monotonic_s()
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(target.hostname, target.port or 80)
            try:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                if b" 200 " not in head.splitlines()[0]:
                    return None
                await reader.readuntil(b"data:")
                first_byte_s = monotonic_s() - start_s
                rest = await reader.read(-1)
                return Answer(first_byte_s, monotonic_s() - start_s) if rest else None
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return None


def _request(url: str, max_new_tokens: int) -> bytes:
    body = msgspec.json.encode(
        {"inputs": "A river is", "parameters": {"max_new_tokens": max_new_tokens}}
    )
    head = (
        f"POST /generate_stream HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


# --- the result


def summarise(rate: float, answers: Sequence[Answer | None]) -> Figures:
    good = [answer for answer in answers if answer is not None]
    if not good:
        raise click.ClickException("no request was answered")
    first = sorted(answer.first_byte_s for answer in good)
    whole = sorted(answer.whole_s for answer in good)
    return Figures(
        rate=rate,
        requests=len(answers),
        failed=len(answers) - len(good),
        first_byte_p50_ms=_percentile_ms(first, 50),
        first_byte_p90_ms=_percentile_ms(first, 90),
        first_byte_p99_ms=_percentile_ms(first, 99),
        first_byte_max_ms=_percentile_ms(first, 100),
        whole_answer_p50_ms=_percentile_ms(whole, 50),
        whole_answer_p90_ms=_percentile_ms(whole, 90),
        whole_answer_p99_ms=_percentile_ms(whole, 99),
        whole_answer_max_ms=_percentile_ms(whole, 100),
    )


def _percentile_ms(ordered_s: Sequence[float], percent: int) -> float:
    """The smallest value that at least ``percent`` of a hundred do not exceed."""
    rank = max(1, -(-len(ordered_s) * percent // 100))
    return round(ordered_s[rank - 1] * 1000, 2)


def _print(figures: Figures) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("ms", "p50", "p90", "p99", "max"):
        table.add_column(heading, justify="left" if heading == "ms" else "right")
    table.add_row(
        "request to first SSE byte",
        f"{figures.first_byte_p50_ms:.1f}",
        f"{figures.first_byte_p90_ms:.1f}",
        f"{figures.first_byte_p99_ms:.1f}",
        f"{figures.first_byte_max_ms:.1f}",
    )
    table.add_row(
        "request to end of answer",
        f"{figures.whole_answer_p50_ms:.1f}",
        f"{figures.whole_answer_p90_ms:.1f}",
        f"{figures.whole_answer_p99_ms:.1f}",
        f"{figures.whole_answer_max_ms:.1f}",
    )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"\n{figures.requests} requests at {figures.rate:g}/s, {figures.failed} failed; "
        "simulated engine at zero delay\n"
    )
    click.echo(msgspec.json.encode(figures))
