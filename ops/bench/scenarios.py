"""Three loads that an average hides: long prompts beside readers, a shared prefix, long contexts.

Each is short and has a limit; what a server cannot do in time, or refuses, is None.
"""

import asyncio
import contextlib
import statistics
import time
from dataclasses import replace
from typing import Any

import msgspec

from ops.bench.load import Load, LoadError, Session, Spread, Target, fit_prompt, gaps_s, spread
from ops.bench.stream import Answer

_STREAMS = 8
_CROWDED_S = 8.0
_ARRIVALS_EVERY_S = 1.0
_LONG_PROMPT = 512
_OWN_TOKENS = 32
_LONG_CONTEXT = 2048
_CONTEXT_LIMIT_S = 60.0
_BEHIND_S = 4.0
_FEW_TOKENS = 8
_ENDLESS = 1500
"""New tokens: more than come in the time of a scenario, few enough for every server's context."""


class Scenarios(msgspec.Struct, frozen=True, kw_only=True):
    """How readers fare in each; gaps are the times between two tokens of a stream."""

    crowded_gap_ms: Spread | None
    """8 streams while a prompt of 512 tokens arrives every second."""
    shared_prefix_ratio: float | None
    """Time to the first token of a second request with the same 512 tokens before its own 32, as a
    multiple of the first's; median of three."""
    short_context_gap_ms: Spread | None
    """8 streams behind 64 tokens each."""
    long_context_gap_ms: Spread | None
    """8 streams behind 2,048 tokens each, from when all of them run."""


async def measure_scenarios(target: Target, load: Load) -> Scenarios:
    return Scenarios(
        crowded_gap_ms=await _crowded(target, load),
        shared_prefix_ratio=await _shared_prefix(target, load),
        short_context_gap_ms=await _context(target, load, load.prompt_tokens),
        long_context_gap_ms=await _context(target, load, _LONG_CONTEXT),
    )


async def _crowded(target: Target, load: Load) -> Spread | None:
    """Streams that are cut off after a while: their gaps while prompts kept arriving."""
    readers = Session(target, _unseen(load, timeout_s=_CROWDED_S))
    arriving = await _session(target, _unseen(load, prompt_tokens=_LONG_PROMPT))
    if arriving is None:
        return None

    async def arrivals() -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(_ARRIVALS_EVERY_S)
                group.create_task(arriving.ask(_FEW_TOKENS))

    arrivals_task = asyncio.create_task(arrivals())
    answers = await asyncio.gather(*(readers.ask(_ENDLESS) for _ in range(_STREAMS)))
    arrivals_task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await arrivals_task
    return _gaps_of_all(answers)


async def _shared_prefix(target: Target, load: Load) -> float | None:
    ratios: list[float] = []
    for _ in range(3):
        session = await _session(
            target,
            _unseen(load, prompt_tokens=_LONG_PROMPT + _OWN_TOKENS, shared_prefix=_LONG_PROMPT),
        )
        if session is None:
            return None
        first, second = await session.ask(_FEW_TOKENS), await session.ask(_FEW_TOKENS)
        if not first.chunk_at_s or not second.chunk_at_s:
            return None
        ratios.append(_first_token_s(second) / _first_token_s(first))
    return round(statistics.median(ratios), 3)


async def _context(target: Target, load: Load, prompt_tokens: int) -> Spread | None:
    """All streams at once, cut off a while after the last one must have begun."""
    session = await _session(target, _unseen(load, prompt_tokens=prompt_tokens))
    if session is None:
        return None
    alone = await session.ask(_FEW_TOKENS)
    if not alone.chunk_at_s:
        return None
    # Beside those that already run, a prompt takes twice as long as alone and more.
    limit_s = 2.5 * _STREAMS * _first_token_s(alone) + _BEHIND_S
    if limit_s > _CONTEXT_LIMIT_S:
        return None
    limited = Session(session.target, replace(session.load, timeout_s=limit_s, seed=load.seed + 1))
    return _gaps_of_all(
        await asyncio.gather(*(limited.ask(_ENDLESS) for _ in range(_STREAMS))),
    )


def _unseen(load: Load, **changes: Any) -> Load:
    """The same load with prompts that the server has not had."""
    return replace(load, seed=time.time_ns(), **changes)


async def _session(target: Target, load: Load) -> Session | None:
    """Prompts of another length; None where the server refuses such."""
    try:
        return Session(await fit_prompt(target, load), load)
    except LoadError:
        return None


def _gaps_of_all(answers: list[Answer]) -> Spread | None:
    """Gaps from when the last stream has begun until the first one ends."""
    if any(len(answer.chunk_at_s) < 2 for answer in answers):
        return None
    begin_s = max(answer.chunk_at_s[0] for answer in answers)
    end_s = min(answer.chunk_at_s[-1] for answer in answers)
    inside = [
        replace(answer, chunk_at_s=[at for at in answer.chunk_at_s if begin_s <= at <= end_s])
        for answer in answers
    ]
    return spread([gap for answer in inside for gap in gaps_s(answer)])


def _first_token_s(answer: Answer) -> float:
    return answer.chunk_at_s[0] - answer.began_s
