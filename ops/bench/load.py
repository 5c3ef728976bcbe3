"""The load client: what one server gives at each concurrency, seen from outside.

How it measures. Every prompt has the same number of tokens, shown to the server's own count, and
none begins as another did. Answers are greedy and, where the API can say so, run on behind the end
token to their full length. With ``concurrency`` c, c clients ask one request after another, each on
a connection of its own; the rate is all tokens over the time from the first request to the last
answer's end. An event of a stream is not always one token: tokens are counted by the server's own
figure at the end of each stream (``usage``, or TGI's details), and only where there is none by
events. *First token* is the time to the first event with text; *gap* the time between two events
with text, as a reader sees it; *per token* a request's time from its first text to its last,
divided by its tokens less one. Percentiles are nearest ranks.
"""

import asyncio
import random
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import msgspec
import orjson

from common.clock import monotonic_s
from ops.bench.dialects import DIALECTS, ApiName, Dialect
from ops.bench.prompts import Prompts
from ops.bench.stream import Answer, post

_PROBE_TIMEOUT_S = 120.0
_WARM_UP_TOKENS = 8


_MODEL_NAMES: dict[str, Callable[[Any], Any]] = {
    "/v1/models": lambda body: body["data"][0]["id"],
    "/info": lambda body: body["model_id"],
}
"""Where servers tell which model they serve."""


class LoadError(Exception):
    """The server cannot be measured: nothing answers, or nothing that we understand."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for. ``requests`` are per client; none begins behind ``limit_s`` of a level."""

    prompt_tokens: int = 64
    new_tokens: int = 128
    shared_prefix: int = 0
    requests: int = 3
    limit_s: float = 60.0
    timeout_s: float = 300.0
    seed: int = field(default_factory=time.time_ns)


class Spread(msgspec.Struct, frozen=True):
    """Of one time, in milliseconds."""

    p50: float
    p90: float
    p99: float
    max: float


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """What one server gave at one concurrency, or at one rate (requests per second).

    ``failures`` counts what went wrong by kind; such requests are in no other figure but
    ``requests``. ``client_cpu`` is the load client's own use of the machine, in cores.
    """

    concurrency: int = 0
    rate: float = 0.0
    requests: int
    failures: dict[str, int]
    seconds: float
    output_tokens: int
    tokens_per_second: float
    prompt_tokens: float | None
    """Mean, by the server's count; None where it gives none."""
    tokens_per_answer: float
    tokens_per_event: float
    first_token_ms: Spread | None
    gap_ms: Spread | None
    per_token_ms: Spread | None
    whole_ms: Spread | None
    client_cpu: float


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answers: where, in which dialect, and how prompts must be made for it."""

    url: str
    dialect: Dialect
    model: str
    headers: dict[str, str]
    run_on: dict[str, object]
    """What makes answers run on behind the end token; empty where nothing does."""
    num_words: int
    """Words in a prompt of the wanted number of tokens."""
    counts_prompts: bool = False
    """Whether it tells the length of a prompt, so that lengths are exact."""

    async def ask(
        self,
        prompt: str,
        new_tokens: int,
        *,
        timeout_s: float,
        on_chunk: Callable[[], None] = lambda: None,
    ) -> Answer:
        return await post(
            self.url,
            self.dialect.make_body(self.model, prompt, new_tokens) | self.run_on,
            self.dialect.read_event,
            headers=self.headers,
            timeout_s=timeout_s,
            on_chunk=on_chunk,
        )


# --- finding out whom we talk to


async def find_target(
    url: str,
    load: Load,
    *,
    api: ApiName | None = None,
    model: str | None = None,
    api_key: str | None = None,
) -> Target:
    """Ask the server for its model, its dialect and the length of a prompt.

    ``url`` is the server's address, with or without ``/v1`` or the route itself.

    Raises: LoadError.
    """
    base, named_api = split_route(url)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    model = model or await _first_model(base, headers) or "default"
    wanted = api or named_api
    refusals: list[str] = []
    for dialect in [DIALECTS[wanted]] if wanted else DIALECTS.values():
        for run_on in (*dialect.run_on, {}):
            target = Target(
                base + dialect.path, dialect, model, headers, run_on, load.prompt_tokens
            )
            # Two tokens: some servers send no text with a single one.
            answer = await target.ask("A river is", 2, timeout_s=_PROBE_TIMEOUT_S)
            if not answer.failure:
                return await fit_prompt(target, load)
            refusals.append(f"{dialect.path}: {answer.failure} {answer.detail[:200]}".strip())
    raise LoadError(f"{base} streams no answer. " + "; ".join(dict.fromkeys(refusals)))


def split_route(url: str) -> tuple[str, ApiName | None]:
    """The address of a server, and the API if ``url`` names its route."""
    url = url if "://" in url else f"http://{url}"
    if urlsplit(url).scheme not in {"http", "https"} or not urlsplit(url).hostname:
        raise LoadError(f"{url} is no http address")
    url = url.rstrip("/")
    for name, dialect in DIALECTS.items():
        if url.endswith(dialect.path):
            return url.removesuffix(dialect.path), name
    return url.removesuffix("/v1"), None


async def _first_model(base: str, headers: dict[str, str]) -> str | None:
    """The name of the model that is served, if the server tells it.

    Raises: LoadError when nothing answers.
    """
    for path, find in _MODEL_NAMES.items():
        try:
            return str(find(orjson.loads(await asyncio.to_thread(_get, base + path, headers))))
        except urllib.error.HTTPError:
            continue
        except OSError as error:
            raise LoadError(f"{base} does not answer: {error}") from error
        except (ValueError, LookupError, TypeError):
            continue
    return None


def _get(url: str, headers: dict[str, str]) -> bytes:
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - split_route checked it
    with urllib.request.urlopen(request, timeout=_PROBE_TIMEOUT_S) as response:  # noqa: S310
        return response.read()


async def fit_prompt(target: Target, load: Load) -> Target:
    """Choose the number of words so that prompts have the wanted number of tokens.

    Exact where each word is one token (see :mod:`ops.bench.prompts`), else on average.

    Raises: LoadError when what the API puts around a prompt is longer than the prompt may be.
    """
    wanted = load.prompt_tokens
    shortest = await _count_tokens(target, 1, load)
    whole = await _count_tokens(target, wanted, load)
    if shortest is None or whole is None:
        return target
    if shortest > wanted:
        raise LoadError(
            f"{target.url} makes {shortest} tokens of the shortest prompt; ask for more with "
            "--prompt-tokens, or choose another --api"
        )
    tokens_per_word = (whole - shortest) / (wanted - 1) if wanted > 1 else 1.0
    num_words = 1 + round((wanted - shortest) / max(tokens_per_word, 1.0))
    return replace(target, num_words=num_words, counts_prompts=True)


async def _count_tokens(target: Target, num_words: int, load: Load) -> int | None:
    """The server's own count of a prompt of so many words; None where it gives none."""
    prompt = Prompts(num_words, seed=load.seed + num_words).next()
    answer = await target.ask(prompt, 2, timeout_s=_PROBE_TIMEOUT_S)
    if answer.failure:
        raise LoadError(f"{target.url}: {answer.failure} {answer.detail[:200]}".strip())
    return answer.num_prompt_tokens


# --- the load


class Meter:
    """What progress shows: events with text so far."""

    def __init__(self) -> None:
        self.num_chunks = 0

    def count(self) -> None:
        self.num_chunks += 1


class Session:
    """One server under load: its prompts go on from level to level, so that none comes twice."""

    def __init__(self, target: Target, load: Load, meter: Meter | None = None) -> None:
        self.target = target
        self.load = load
        self.meter = meter or Meter()
        self._prompts = Prompts(target.num_words, num_shared=load.shared_prefix, seed=load.seed)

    async def warm_up(self, concurrency: int) -> None:
        """A short answer for each place, so that kernels, memory and connections are there."""
        await asyncio.gather(*(self.ask(_WARM_UP_TOKENS) for _ in range(concurrency)))

    async def closed_loop(self, concurrency: int) -> Level:
        """A constant number of clients, each of which asks again when it was answered."""
        load = self.load
        answers: list[Answer] = []
        began_s = monotonic_s()

        async def client() -> None:
            for number in range(load.requests):
                if number and monotonic_s() > began_s + load.limit_s:
                    return
                answers.append(await self.ask(load.new_tokens))

        async def clients() -> None:
            await asyncio.gather(*(client() for _ in range(concurrency)))

        used_s = await _cpu_time_of(clients())
        return summarise(answers, used_s, concurrency=concurrency)

    async def open_loop(self, rate: float) -> Level:
        """Requests at random times of a set rate for ``limit_s``, however long answers take."""
        answers: list[Answer] = []

        async def arrivals() -> None:
            answers.extend(await self.arrivals(rate))

        used_s = await _cpu_time_of(arrivals())
        return summarise(answers, used_s, rate=rate)

    async def arrivals(self, rate: float) -> list[Answer]:
        """The answers of an open loop; it has the same pauses whenever the load is the same."""
        asked: list[asyncio.Task[Answer]] = []
        chance = random.Random(self.load.seed)
        next_s = began_s = monotonic_s()
        while next_s < began_s + self.load.limit_s:
            await asyncio.sleep(max(0.0, next_s - monotonic_s()))
            asked.append(asyncio.create_task(self.ask(self.load.new_tokens)))
            next_s += chance.expovariate(rate)
        return await asyncio.gather(*asked)

    async def ask(self, new_tokens: int) -> Answer:
        return await self.target.ask(
            self._prompts.next(),
            new_tokens,
            timeout_s=self.load.timeout_s,
            on_chunk=self.meter.count,
        )


async def _cpu_time_of(work: Awaitable[None]) -> float:
    """Seconds of processor time that this process spends while ``work`` runs."""
    began_s = time.process_time()
    await work
    return time.process_time() - began_s


# --- the figures


def summarise(
    answers: Sequence[Answer], cpu_s: float, *, concurrency: int = 0, rate: float = 0.0
) -> Level:
    good = [answer for answer in answers if not answer.failure]
    began_s = min((answer.began_s for answer in answers), default=0.0)
    seconds = max((answer.ended_s for answer in answers), default=0.0) - began_s
    output_tokens = sum(answer.num_tokens for answer in good)
    num_chunks = sum(len(answer.chunk_at_s) for answer in good)
    prompts = [a.num_prompt_tokens for a in good if a.num_prompt_tokens is not None]
    return Level(
        concurrency=concurrency,
        rate=rate,
        requests=len(answers),
        failures=dict(Counter(answer.failure for answer in answers if answer.failure)),
        seconds=round(seconds, 3),
        output_tokens=output_tokens,
        tokens_per_second=round(output_tokens / seconds, 2) if seconds else 0.0,
        prompt_tokens=round(sum(prompts) / len(prompts), 1) if prompts else None,
        tokens_per_answer=round(output_tokens / len(good), 1) if good else 0.0,
        tokens_per_event=round(output_tokens / num_chunks, 2) if num_chunks else 0.0,
        first_token_ms=spread([a.chunk_at_s[0] - a.began_s for a in good if a.chunk_at_s]),
        gap_ms=spread([gap for answer in good for gap in gaps_s(answer)]),
        per_token_ms=spread([s for s in map(_per_token_s, good) if s is not None]),
        whole_ms=spread([answer.ended_s - answer.began_s for answer in good]),
        client_cpu=round(cpu_s / seconds, 3) if seconds else 0.0,
    )


def gaps_s(answer: Answer) -> list[float]:
    """The times between an answer's events with text."""
    at = answer.chunk_at_s
    return [later - earlier for earlier, later in pairwise(at)]


def _per_token_s(answer: Answer) -> float | None:
    if len(answer.chunk_at_s) < 2 or answer.num_tokens < 2:
        return None
    return (answer.chunk_at_s[-1] - answer.chunk_at_s[0]) / (answer.num_tokens - 1)


def spread(times_s: Sequence[float]) -> Spread | None:
    """None of no times."""
    if not times_s:
        return None
    ordered = sorted(times_s)

    def rank(percent: int) -> float:
        """The smallest time that at least ``percent`` of a hundred do not exceed."""
        place = max(1, -(-len(ordered) * percent // 100))
        return round(ordered[place - 1] * 1000, 2)

    return Spread(rank(50), rank(90), rank(99), rank(100))
