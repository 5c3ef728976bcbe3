"""Dead letters: generations that were ended because workers died of them, kept to be looked at.

The end of a generation stands: its log has its one final entry, and whoever read it was told. So to
ask it anew is a new request, under an id that is drawn once; whoever asks again is told that id.
The list is kept for seven days, the prompt that it takes to ask anew for one.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from common.broker import keys
from common.broker.connection import Client, mapped_errors
from common.broker.steps import Admission, Admitted, Presentation
from common.failures import Failure
from common.ids import choice_of, new_request_id, request_of
from common.logs import get_logger
from common.messages import GenerationSpec, Lane

log = get_logger()

MAX_SHOWN = 200

_pack = msgspec.msgpack.Encoder().encode
_spec = msgspec.msgpack.Decoder(GenerationSpec).decode
_presentation = msgspec.msgpack.Decoder(Presentation).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One line of the list."""

    id: str
    at: float
    """When it was ended, in seconds since 1970."""
    tenant: str
    lane: str
    worker: str
    """The last that died of it."""
    deaths: int
    tokens: int
    """That had been shown."""
    model_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What speaks for and against it, with how it was asked; never with what was asked.

    ``parameters`` name numbers and kinds, and only count stop strings. Times are in seconds;
    ``waited`` until the first claim, ``first_token`` from there, None: never.
    """

    letter: DeadLetter
    is_kept: bool
    """Whether it can be asked anew: its prompt is still there."""
    requeued_as: str = ""
    """The request under which it was asked anew; empty: it was not."""
    workers: list[str]
    """All that died with it, in order, as far as they are known."""
    prompt_tokens: int = 0
    parameters: dict[str, Any]
    api: str = ""
    asked_at: float | None = None
    waited: float | None = None
    first_token: float | None = None
    lasted: float | None = None


@dataclass(frozen=True, slots=True)
class Requeued:
    request_id: str
    is_repeated: bool
    """It had been asked anew before; nothing happened now."""


class DeadLetterStore:
    """All methods raise Failure BROKER_UNAVAILABLE or BROKER_FULL for what Redis answers.

    ``call`` runs a step of the protocol, ``admit`` is the broker's own.
    """

    def __init__(
        self,
        redis: Client,
        prefix: str,
        call: Callable[..., Awaitable[Any]],
        admit: Callable[[Admission], Awaitable[Admitted]],
    ) -> None:
        self._redis: Any = redis
        self._prefix = prefix
        self._call = call
        self._admit = admit

    async def newest(self, limit: int = MAX_SHOWN) -> list[DeadLetter]:
        """The newest first."""
        with mapped_errors():
            found = await self._redis.execute_command(
                "XREVRANGE", keys.dead(self._prefix), "+", "-", "COUNT", limit
            )
        return [_letter(entry, fields) for entry, fields in found]

    async def get(self, generation_id: str) -> Evidence:
        """Raises: Failure NOT_FOUND."""
        _, letter = await self._find(generation_id)
        with mapped_errors():
            kept: dict[bytes, bytes] = await self._redis.execute_command(
                "HGETALL", keys.dead_letter(self._prefix, generation_id)
            )
        if letter is None and not kept:
            raise _not_found(generation_id)
        return _evidence(generation_id, letter, {k.decode(): v for k, v in kept.items()})

    async def read_spec(self, generation_id: str) -> GenerationSpec | None:
        """What was asked; None where it is no dead letter, or its prompt is no longer kept."""
        with mapped_errors():
            body = await self._redis.execute_command(
                "HGET", keys.dead_letter(self._prefix, generation_id), "body"
            )
        return _spec(body) if body else None

    async def requeue(self, generation_id: str, cause: str) -> Requeued:
        """Ask it anew, once, without its deaths; it runs on whether somebody reads it or not. The
        log says so, with ``cause``: who wants it.

        Raises: Failure NOT_FOUND; STREAM_EXPIRED when its prompt is no longer kept; what
            :meth:`Broker.admit` does, after which it can be tried again.
        """
        found = await self._call("take_letter", _pack((generation_id, new_request_id())))
        if found is None:
            _, letter = await self._find(generation_id)
            raise _not_found(generation_id) if letter is None else _expired()
        kept = {name.decode(): value for name, value in zip(found[::2], found[1::2], strict=True)}
        request_id = kept["again"].decode()
        if not kept.get("body"):
            if "entry" not in kept:
                return Requeued(request_id, is_repeated=True)
            raise _expired()
        if document := kept.get("doc"):
            with mapped_errors():
                await self._redis.set(
                    keys.document(self._prefix, request_id), document, px=_ttl_ms(kept)
                )
        await self._admit(_admission(generation_id, request_id, kept))
        await self._call("drop_letter", _pack((generation_id, "", True)))
        _tell("job.revived", generation_id, cause, revived_as=request_id)
        return Requeued(request_id, is_repeated=False)

    async def discard(self, generation_id: str, cause: str) -> None:
        """Remove it, prompt and all; the log says so, with ``cause``. Raises: Failure NOT_FOUND."""
        entry, _ = await self._find(generation_id)
        if not await self._call("drop_letter", _pack((generation_id, entry, False))):
            raise _not_found(generation_id)
        _tell("job.discarded", generation_id, cause)

    async def _find(self, generation_id: str) -> tuple[str, DeadLetter | None]:
        """Its entry in the list, which is short: few requests kill four workers."""
        with mapped_errors():
            found = await self._redis.execute_command(
                "XREVRANGE", keys.dead(self._prefix), "+", "-", "COUNT", 10_000
            )
        for entry, fields in found:
            if fields[b"id"] == generation_id.encode():
                return entry.decode(), _letter(entry, fields)
        return "", None


def _tell(event: str, generation_id: str, cause: str, **fields: str) -> None:
    """A line of the request that it was, and not of the one by which it was asked for."""
    log.info(
        event, request_id=request_of(generation_id), job_id=generation_id, cause=cause, **fields
    )


def _letter(entry: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    return DeadLetter(
        id=fields[b"id"].decode(),
        at=int(entry.partition(b"-")[0]) / 1000,
        tenant=fields[b"tenant"].decode(),
        lane=fields[b"lane"].decode(),
        worker=fields[b"worker"].decode(),
        deaths=int(fields[b"deaths"]),
        tokens=int(fields[b"next"]),
        model_version=fields[b"version"].decode(),
    )


def _evidence(generation_id: str, letter: DeadLetter | None, kept: dict[str, bytes]) -> Evidence:
    """Of what is kept of it, which may be only the line of the list, or only where it went."""
    workers = kept["died_on"].decode().split() if kept else [letter.worker] if letter else []
    letter = letter or DeadLetter(
        id=generation_id,
        at=int(kept["t3"]) / 1000,
        tenant=kept["tenant"].decode(),
        lane=kept["lane"].decode(),
        worker=workers[-1],
        deaths=int(kept["deaths"]),
        tokens=int(kept["next"]),
        model_version=kept["version"].decode(),
    )
    body = kept.get("body")
    spec = _spec(body) if body else None
    requeued_as = kept.get("again", b"").decode()
    if not kept:
        return Evidence(letter=letter, is_kept=False, workers=workers, parameters={})
    asked, claimed, first, ended = (int(kept[name]) / 1000 for name in ("t0", "t1", "t2", "t3"))
    return Evidence(
        letter=letter,
        is_kept=spec is not None,
        requeued_as="" if spec is not None else requeued_as,
        workers=workers,
        prompt_tokens=len(spec.prompt) // 4 if spec else 0,
        parameters=_parameters(spec) if spec else {},
        api=_presentation(kept["out"]).api,
        asked_at=asked,
        waited=round(claimed - asked, 3) if claimed else None,
        first_token=round(first - claimed, 3) if first else None,
        lasted=round(ended - asked, 3),
    )


def _parameters(spec: GenerationSpec) -> dict[str, Any]:
    """How it was asked: what differs from the usual, and of texts only what they are."""
    told = {
        name: value
        for name, value in msgspec.to_builtins(spec.sampling).items()
        if name not in ("grammar", "stop", "stop_token_ids", "logit_bias")
    }
    sampling = spec.sampling
    if sampling.grammar is not None:
        told["grammar"] = sampling.grammar.kind
    told |= {
        f"num_{name}": len(values)
        for name, values in (
            ("stop", sampling.stop),
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", sampling.logit_bias),
        )
        if values
    }
    if spec.adapter:
        told["adapter"] = spec.adapter
    return told


def _admission(generation_id: str, request_id: str, kept: dict[str, bytes]) -> Admission:
    spec = _spec(kept["body"])
    sampling = spec.sampling.of_choice(choice_of(generation_id))
    return Admission(
        request_id=request_id,
        spec=msgspec.structs.replace(spec, sampling=sampling, request_id=request_id),
        cost=int(kept["cost"]),
        # It is told to nobody by itself: who asked knows another id.
        presentation=msgspec.structs.replace(
            _presentation(kept["out"]), num_choices=1, is_background=False
        ),
        gateway="",
        lane=msgspec.convert(kept["lane"].decode(), Lane),
        tenant=kept["tenant"].decode(),
        weight=float(kept["weight"]),
        attached=False,
        queue_limit_ms=max(1000, int(kept["queue_limit"])),
        run_limit_ms=int(kept["run_limit"]),
        retention_ms=int(kept["retention"]),
    )


def _ttl_ms(kept: dict[str, bytes]) -> int:
    limits = ("queue_limit", "run_limit", "retention")
    return sum(int(kept[name]) for name in limits) + 5 * 60_000


def _not_found(generation_id: str) -> Failure:
    return Failure("NOT_FOUND", f"There is no dead letter {generation_id}")


def _expired() -> Failure:
    return Failure(
        "STREAM_EXPIRED", "Its prompt is no longer kept, so it cannot be asked anew, only discarded"
    )
