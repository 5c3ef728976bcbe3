"""Short forms for protocol steps: an admission, a worker that is alive, the next publication."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.broker import (
    Admission,
    Broker,
    Claimed,
    Presentation,
    Publication,
    Room,
    WorkerPresence,
)
from common.ids import generation_id, new_nonce, new_request_id
from common.messages import (
    Finish,
    GenerationSpec,
    Lane,
    Sampling,
    TokenRecord,
    chain_next,
    chain_start,
    chain_text,
)

VERSION = "m@1"
LEASE_MS = 5000


def admission(
    *, prompt_tokens: int = 4, max_new_tokens: int = 8, request_id: str = "", **fields: Any
) -> Admission:
    """A request of tenant ``public`` that gateway ``g1`` reads, unless ``fields`` say otherwise."""
    request_id = request_id or new_request_id()
    spec = GenerationSpec(
        prompt=struct.pack(f"<{prompt_tokens}I", *range(prompt_tokens)),
        sampling=Sampling(max_new_tokens=max_new_tokens, seed=7),
        request_id=request_id,
    )
    options: dict[str, Any] = {"gateway": "g1", **fields}
    return Admission(
        request_id=request_id,
        spec=spec,
        cost=prompt_tokens + max_new_tokens,
        presentation=Presentation("tgi", 0, 1_700_000_000, prompt_tokens),
        **options,
    )


async def admit(broker: Broker, **fields: Any) -> str:
    """Admit one request; returns the id of its first generation."""
    return generation_id((await broker.admit(admission(**fields))).request_id)


@dataclass
class Attempt:
    """A claimed generation and what its worker would publish next."""

    claimed: Claimed
    version: str = VERSION
    at: int = 0
    chain: int = 0
    prev: str = ""

    def __post_init__(self) -> None:
        self.at, self.prev = self.claimed.next, self.claimed.chain
        empty = chain_start(self.claimed.id, self.version)
        self.chain = int(self.prev, 16) if self.prev else empty

    @property
    def id(self) -> str:
        return self.claimed.id

    @property
    def held(self) -> tuple[str, str]:
        return self.claimed.id, self.claimed.fence

    def next(self, *tokens: int, finish: str = "", code: str = "") -> Publication:
        """The publication that continues this attempt; calling it moves the attempt on."""
        prev, start = self.prev, self.at
        for token in tokens:
            self.chain = chain_next(self.chain, token)
        self.at += len(tokens)
        self.prev = chain_text(self.chain)
        return Publication(
            self.claimed.id,
            self.claimed.fence,
            prev,
            TokenRecord(
                start=start,
                chain=self.prev if self.at else "",
                tokens=list(tokens),
                pieces=[b"x"] * len(tokens),
                logprobs=[-0.5] * len(tokens),
                finish=Finish(finish, code) if finish else None,
            ),
        )


@dataclass
class ScriptedClaims:
    """A worker as the broker sees it: beats, claims with rising turns, publishes."""

    broker: Broker
    name: str = "w1"
    version: str = VERSION
    max_cost: int = 10_000
    turn: int = 0
    lease_ms: int = LEASE_MS
    holding: list[str] = field(default_factory=list[str])

    async def beat(self, *, seen: int | None = None) -> list[str]:
        presence = WorkerPresence(self.version, self.max_cost, 100.0)
        beat = await self.broker.beat_worker(
            self.name,
            presence,
            seen=self.turn if seen is None else seen,
            holding=self.holding,
            lease_ms=self.lease_ms,
        )
        return beat.returned

    async def claim(
        self,
        *,
        budget: int = 10_000,
        limit: int = 32,
        rooms: Mapping[Lane, Room] | None = None,
    ) -> list[Attempt]:
        self.turn += 1
        answer = await self.broker.claim(
            self.name,
            new_nonce(),
            self.turn,
            budget=budget,
            max_generations=limit,
            model_version=self.version,
            rooms=rooms,
        )
        self.holding += [claimed.id for claimed in answer.generations]
        return [Attempt(claimed, self.version) for claimed in answer.generations]

    async def claim_one(self) -> Attempt:
        [attempt] = await self.claim(limit=1)
        return attempt

    async def publish(self, *publications: Publication) -> list[tuple[str, str]]:
        """Publish; returns (id, kind) of what was refused."""
        answer = await self.broker.publish(self.name, publications, lease_ms=self.lease_ms)
        return [(refusal.id, refusal.kind) for refusal in answer.refusals]
