"""Who speaks the protocol, in miniature: workers without an engine and gateways without clients.

They follow the rules of protocol.md, section 5, and nothing more, so that a test can let them lose
an answer, forget, come late or die. Every attempt makes tokens of its own: two attempts never
agree, the worst that an inexact engine can do.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common.broker import (
    Broker,
    ClaimAnswer,
    Claimed,
    Publication,
    PublishAnswer,
    Room,
    WorkerPresence,
)
from common.messages import Finish, Lane, LogEntry, TokenRecord, chain_next, chain_start, chain_text

LEASE_MS = 600_000
"""Longer than any test: leases end when the test says so."""


@dataclass
class Attempt:
    """One claim of one generation, as its worker knows it."""

    id: str
    fence: str
    position: int
    chain: int
    room: int
    """Tokens that may still be made."""
    unacknowledged: list[Publication] = field(default_factory=list[Publication])

    def make(self, count: int, finish: Finish | None = None) -> Publication:
        """The next ``count`` tokens, or as many as there is room for, and perhaps the end."""
        start, prev_chain = self.position, self.chain_text
        tokens = [self._token(start + i) for i in range(min(count, self.room))]
        for token in tokens:
            self.chain = chain_next(self.chain, token)
        self.position += len(tokens)
        self.room -= len(tokens)
        pieces = [f"{token} ".encode() for token in tokens]
        record = TokenRecord(start, self.chain_text, tokens, pieces, None, finish)
        publication = Publication(self.id, self.fence, prev_chain, record)
        self.unacknowledged.append(publication)
        return publication

    @property
    def chain_text(self) -> str:
        """As Redis stores it: empty at position 0."""
        return chain_text(self.chain) if self.position else ""

    def _token(self, position: int) -> int:
        return zlib.crc32(f"{self.id} {self.fence} {position}".encode())


class Worker:
    """Holds attempts; everything that it sends can be withheld, repeated or ignored."""

    def __init__(self, broker: Broker, name: str, version: str, max_cost: int = 10_000) -> None:
        self.name = name
        self.version = version
        self.max_cost = max_cost
        self.turn = 0
        self.attempts: dict[str, Attempt] = {}
        self._broker = broker

    @property
    def presence(self) -> WorkerPresence:
        return WorkerPresence(self.version, self.max_cost, tokens_per_second=100.0)

    def next_nonce(self) -> str:
        return f"{zlib.crc32(self.name.encode()):08x}{self.turn + 1:08x}"

    async def beat(self) -> list[str]:
        """Renew the lease; everything claimed up to now that is not held was lost on the way."""
        beat = await self._broker.beat_worker(
            self.name,
            self.presence,
            seen=self.turn,
            holding=list(self.attempts),
            lease_ms=LEASE_MS,
        )
        for generation_id in beat.returned:
            self.attempts.pop(generation_id, None)
        return beat.returned

    async def claim(
        self,
        *,
        budget: int = 1_000_000,
        max_generations: int = 32,
        loses_answer: bool = False,
        rooms: Mapping[Lane, Room] | None = None,
    ) -> ClaimAnswer:
        """Claim; with ``loses_answer`` the worker never learns what it owns now."""
        nonce = self.next_nonce()
        self.turn += 1
        answer = await self._broker.claim(
            self.name,
            nonce,
            self.turn,
            budget=budget,
            max_generations=max_generations,
            model_version=self.version,
            rooms=rooms,
        )
        if not loses_answer:
            for claimed in answer.generations:
                self._adopt(claimed)
        return answer

    def holds(self, generation_id: str, fence: str) -> bool:
        attempt = self.attempts.get(generation_id)
        return attempt is not None and attempt.fence == fence

    def _adopt(self, claimed: Claimed) -> None:
        assert claimed.spec is not None, "the specs of these tests are small"
        start = chain_start(claimed.id, self.version)
        self.attempts[claimed.id] = Attempt(
            claimed.id,
            claimed.fence,
            claimed.next,
            int(claimed.chain, 16) if claimed.next else start,
            claimed.spec.sampling.max_new_tokens - claimed.next,
        )

    async def publish(self, publications: Sequence[Publication]) -> PublishAnswer:
        """Send, and believe the answer: acknowledged, to be sent again, or not ours any more."""
        answer = await self._broker.publish(self.name, publications, lease_ms=LEASE_MS)
        refused = {refusal.id: refusal for refusal in answer.refusals}
        for publication in publications:
            attempt = self.attempts.get(publication.id)
            if attempt is None or attempt.fence != publication.fence:
                continue
            refusal = refused.get(publication.id)
            if refusal is None:
                self._acknowledge(attempt, publication)
            elif refusal.kind != "realign":
                del self.attempts[publication.id]
        return answer

    def _acknowledge(self, attempt: Attempt, publication: Publication) -> None:
        if publication in attempt.unacknowledged:
            attempt.unacknowledged.remove(publication)
        if publication.record.finish is not None:
            del self.attempts[attempt.id]

    def unacknowledged(self) -> list[Publication]:
        return [item for attempt in self.attempts.values() for item in attempt.unacknowledged]


@dataclass
class Reader:
    """A client's place in one stream: what it has been shown, and nothing twice."""

    id: str
    tenant: str
    start: int = 0
    chain: str = ""
    tokens: list[int] = field(default_factory=list[int])
    finish: Finish | None = None

    @property
    def cursor(self) -> int:
        return self.start + len(self.tokens)

    def take(self, entry: LogEntry) -> bool:
        """Show what is new of an entry; False: something before it is missing, read the log.

        Raises: AssertionError: the entry contradicts what was shown.
        """
        record = entry.record
        if record.end == self.cursor and self.chain:
            assert record.chain == self.chain, f"{self.id} diverged at {self.cursor}"
        if self.finish is not None or (record.end <= self.cursor and record.finish is None):
            return True
        if record.start > self.cursor:
            return False
        self._show(record.tokens[self.cursor - record.start :], record)
        self.finish = record.finish
        return True

    def _show(self, tokens: list[int], record: TokenRecord) -> None:
        if tokens and self.chain:
            chain = int(self.chain, 16)
            for token in tokens:
                chain = chain_next(chain, token)
            assert chain_text(chain) == record.chain, f"{self.id} diverged behind {self.cursor}"
        self.tokens += tokens
        assert self.cursor == record.end, f"{self.id} ends at {record.end}, not at {self.cursor}"
        self.chain = record.chain


class Gateway:
    """One inbox and the readers that live on it."""

    def __init__(self, broker: Broker, name: str) -> None:
        self.name = name
        self.readers: list[Reader] = []
        self.is_whole = True
        """Nothing was lost since every stream was last looked at."""
        self._broker = broker
        self._after = "0"
        self._finals: dict[str, int] = {}

    async def beat(self) -> None:
        beat = await self._broker.beat_gateway(self.name, lease_ms=LEASE_MS)
        if beat.recreated:
            self._after = beat.last_id
            for reader in self.readers:
                await self._join(reader)

    async def attach(self, reader: Reader) -> bool:
        """Let a client read from its cursor on; False: unknown, expired, or somebody else's."""
        self.readers.append(reader)
        if not await self._join(reader):
            self.readers.remove(reader)
            return False
        return True

    async def detach(self, generation_id: str) -> None:
        """All clients of this gateway that read the generation leave."""
        self.readers = [reader for reader in self.readers if reader.id != generation_id]
        await self._broker.detach(self.name, generation_id)

    async def poll(self) -> None:
        """Deliver what lies in the inbox; heal by reading where something is missing."""
        self._after, items = await self._broker.read_inbox(self.name, self._after, 1)
        for generation_id, entry in items:
            if entry.record.finish is not None:
                self._finals[generation_id] = self._finals.get(generation_id, 0) + 1
                assert self._finals[generation_id] == 1, f"two ends of {generation_id} delivered"
            for reader in self._readers_of(generation_id):
                if not reader.take(entry):
                    await self._read_on(reader)

    async def check_tails(self) -> None:
        """Look at every open stream, as for one that has been quiet for long."""
        open_ids = sorted({reader.id for reader in self.readers if reader.finish is None})
        for look in await self._broker.look(self.name, open_ids):
            for reader in self._readers_of(look.id):
                if look.state in ("Q", "R") and not look.subscribed:
                    await self._join(reader)
                elif look.state == "T" or look.next > reader.cursor:
                    await self._read_on(reader)
        self.is_whole = True

    async def _join(self, reader: Reader) -> bool:
        attachment = await self._broker.attach(self.name, reader.id, reader.tenant, reader.cursor)
        if attachment is None:
            return False
        self._take_page(reader, attachment.entries)
        if reader.cursor < attachment.next or attachment.state == "T":
            await self._read_on(reader)
        return True

    async def _read_on(self, reader: Reader) -> None:
        while reader.finish is None:
            page = await self._broker.read(reader.id, reader.cursor)
            assert page is not None, f"the log of {reader.id} is gone"
            before = reader.cursor
            self._take_page(reader, page.entries)
            if reader.cursor == before:
                return

    def _take_page(self, reader: Reader, entries: Sequence[LogEntry]) -> None:
        if reader.cursor:
            assert entries, f"a page of {reader.id} does not reach back to {reader.cursor}"
            assert entries[0].record.start < reader.cursor, "it must tell the chain at the cursor"
        for entry in entries:
            assert reader.take(entry), f"a page of {reader.id} has a gap at {reader.cursor}"

    def _readers_of(self, generation_id: str) -> list[Reader]:
        return [reader for reader in self.readers if reader.id == generation_id]
