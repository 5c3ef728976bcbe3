"""What this gateway admitted a moment ago, kept in case Redis forgets it.

A Redis that restarts may lose its last second. The gateway that admitted a request still holds it,
and queues it again under the same id: the client sees a pause. An admission is kept until its first
token has come *and* five seconds have passed; memory is bounded.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from common.broker import Admission, Broker
from common.clock import monotonic_s
from common.ids import generation_id
from common.logs import get_logger

log = get_logger()

KEEP_S = 5.0
"""Longer than any Redis with persistence can go back (1 s, 2 s when its disk stalls)."""
MAX_BYTES = 256 * 1024 * 1024


@dataclass(slots=True)
class _Kept:
    admission: Admission
    at: float
    has_token: bool = False
    document: bytes = b""
    """What its response says beside its tokens."""
    document_ttl_ms: int = 0


class RecentAdmissions:
    def __init__(self, broker: Broker, max_bytes: int = MAX_BYTES) -> None:
        self._broker = broker
        self._max_bytes = max_bytes
        self._kept: dict[str, _Kept] = {}
        self._bytes = 0

    def ids(self) -> list[str]:
        """The requests that are kept."""
        return list(self._kept)

    def keep(self, admission: Admission) -> None:
        """Remember an admission, dropping the oldest beyond the memory limit."""
        self._kept[admission.request_id] = _Kept(admission, monotonic_s())
        self._bytes += len(admission.spec.prompt)
        while self._bytes > self._max_bytes:
            self.forget(next(iter(self._kept)))

    def keep_document(self, request_id: str, document: bytes, ttl_ms: int) -> None:
        """Remember what belongs to an admission as long as itself, if it is still kept."""
        kept = self._kept.get(request_id)
        if kept is not None:
            kept.document, kept.document_ttl_ms = document, ttl_ms
            self._bytes += len(document)

    async def put_back_documents(self) -> None:
        """Have Redis know the documents again that it may have forgotten.

        Raises: Failure BROKER_UNAVAILABLE, BROKER_FULL.
        """
        for request_id, kept in list(self._kept.items()):
            if kept.document:
                await self._broker.keep_document(request_id, kept.document, kept.document_ttl_ms)

    def forget(self, request_id: str) -> None:
        kept = self._kept.pop(request_id, None)
        if kept is not None:
            self._bytes -= len(kept.admission.spec.prompt) + len(kept.document)

    def forget_of(self, tenant: str, request_id: str) -> None:
        """The same, if it is the tenant's: what another one cancels stays as safe as it was."""
        kept = self._kept.get(request_id)
        if kept is not None and kept.admission.tenant == tenant:
            self.forget(request_id)

    def note_first_token(self, request_id: str) -> None:
        """Of any choice: all were admitted in one step."""
        kept = self._kept.get(request_id)
        if kept is not None:
            kept.has_token = True

    def forget_old(self, read: Collection[str]) -> None:
        """Drop what is old enough and has shown a token, or has no reader in ``read``."""
        horizon = monotonic_s() - KEEP_S
        for name, kept in list(self._kept.items()):
            if kept.at > horizon:
                break  # in order of admission
            if kept.has_token or name not in read:
                self.forget(name)

    async def resubmit(self, request_id: str, gateway: str) -> bool:
        """Queue a request again, all its choices, if it is kept; ``gateway`` "" when nobody reads
        it now.
        """
        kept = self._kept.get(request_id)
        if kept is None:
            return False
        await self._broker.admit(replace(kept.admission, gateway=gateway, resubmit=True))
        log.warning("admission.resubmitted", job_id=generation_id(request_id))
        return True
