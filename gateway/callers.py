"""Who calls: the tenant that a request belongs to, and what it may do.

A key is looked up in Redis and then known for half a second, so a revoked one is refused on every
gateway within a second. Where no key is asked for, everybody is the tenant ``public`` and may do
everything. What belongs to one tenant does not exist for another.
"""

import hmac
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import msgspec
import structlog
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from common import keys
from common.broker import KeyStore
from common.clock import monotonic_s, wall_ms
from common.failures import Failure
from common.keys import NO_LIMITS, PUBLIC_TENANT, SCOPES, ApiKey, Limits
from common.messages import LANES, Lane
from common.settings import GatewaySettings, is_loopback
from gateway.order import Order
from gateway.stream_tokens import StreamTokens, token_in

KNOWN_S = 0.5
"""How long what Redis said of a key holds here. With the look-up it must stay under a second."""
MAX_KNOWN = 10_000
"""Keys remembered at once; who tries out names can not fill the memory."""
NOTE_USE_S = 60.0
"""How exactly it is known when a key was last used."""

_OPEN_PATHS = frozenset(
    {
        "/health",
        "/ping",
        "/ready",
        "/v2/health/live",
        "/v2/health/ready",
        "/docs",
        "/openapi.json",
        "/api-doc/openapi.json",
        "/ops",
        "/ops/",
    }
)
"""What says whether this gateway is well, and what there is; TGI asks for no key there either."""
_PAGE = "/ui"
_SCOPES_OF_PATHS: dict[str, keys.Scope] = {
    "/metrics": "metrics",
    "/ops": "admin",
    "/v1/batches": "batch",
    "/v1/files": "batch",
    "/v1/stats": "metrics",
}
"""By path, and by what lies below it; all others need ``generate``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    tenant: str = PUBLIC_TENANT
    key_id: str = ""
    """Public part of the key; empty where none is asked for."""
    scopes: frozenset[keys.Scope] = frozenset(SCOPES)
    models: frozenset[str] = frozenset()
    """Names of models and adapters that may be asked for; none: all."""
    best_lane: Lane = LANES[0]
    """No request of this caller waits in a lane before this one."""
    limits: Limits = NO_LIMITS
    tenant_hash: str = ""
    """What stands for the tenant in logs."""
    has_key: bool = False
    """A key that holds was shown, and not just something in its place, as SDKs send."""

    def may_use(self, model: str) -> bool:
        """``model`` is the name of a model or of an adapter."""
        return not self.models or model in self.models

    def lane_for(self, asked: Lane) -> Lane:
        """Where a request that asks for the lane ``asked`` waits."""
        return LANES[max(LANES.index(asked), LANES.index(self.best_lane))]


PUBLIC = Caller()
"""Everybody, where no key is asked for."""


def caller_of(request: Request) -> Caller:
    """Whose request it is."""
    return request.scope["headrace.caller"]


def permitted(caller: Caller, order: Order, model: str) -> Order:
    """The order as this caller may have it: its lane is lowered to the best that the key allows,
    as OpenAI serves a tier that a project does not have, and the answer names the lane it had.

    Raises: Failure MODEL_NOT_ALLOWED.
    """
    asked = order.adapter.partition("@")[0] or model
    if not caller.may_use(asked):
        raise Failure("MODEL_NOT_ALLOWED", f"This API key is not for {asked}", field="model")
    if caller.lane_for(order.lane) == order.lane:
        return order
    document = order.document
    if document is not None:
        echo = document.echo | {"service_tier": caller.best_lane}
        document = msgspec.structs.replace(document, echo=echo)
    return replace(order, lane=caller.best_lane, document=document)


class Callers:
    """Finds out who calls.

    Raises: Failure ACCESS_MISCONFIGURED for a pepper that is too short or that others may read.
    """

    def __init__(self, settings: GatewaySettings, store: KeyStore) -> None:
        self._settings = settings
        self._store = store
        self._static = settings.api_key.get_secret_value().encode()
        self._pepper = self._read_pepper()
        self._own_secret = secrets.token_bytes(32)
        self._known: dict[str, tuple[float, ApiKey | None]] = {}
        self._hashes: dict[tuple[bytes | None, str], str] = {}
        self._noted: dict[str, float] = {}
        self._any_known: tuple[float, bool] | None = None

    def prompt_hash(self, prompt: bytes) -> str:
        """What stands for a prompt in logs: without the pepper nobody can try out what it was."""
        return hmac.digest(self._pepper or self._own_secret, prompt, "sha256").hex()[:16]

    async def check(self) -> None:
        """Refuse to serve where anybody could call, or where no key could be checked.

        Raises: Failure ACCESS_MISCONFIGURED, BROKER_UNAVAILABLE.
        """
        has_keys = await self._store.has_any()
        if has_keys:
            await self._store.check_pepper(keys.fingerprint(self._pepper_for_checks()))
        is_guarded = has_keys or self._static or self._settings.allow_anonymous
        if not is_guarded and not is_loopback(self._settings.host):
            raise Failure(
                "ACCESS_MISCONFIGURED",
                f"Whoever reaches {self._settings.host} could use this gateway. Make a key first "
                "(headrace keys create TENANT), or say --allow-anonymous",
            )

    async def identify(self, headers: Headers, needed: keys.Scope) -> Caller:
        """Who sent ``headers``, to do what needs the scope ``needed``.

        Raises: Failure AUTH_MISSING, AUTH_INVALID, AUTH_EXPIRED, SCOPE_DENIED; BROKER_UNAVAILABLE,
            ACCESS_MISCONFIGURED when that can not be found out.
        """
        return checked(await self._identified(headers), needed)

    async def _identified(self, headers: Headers) -> Caller:
        sent = headers.get("authorization", "")
        if not sent and await self._takes_anonymous():
            return self._public
        scheme, _, text = sent.partition(" ")
        text = text.strip()
        if scheme.lower() != "bearer" or not text:
            raise Failure("AUTH_MISSING")
        if self._static and hmac.compare_digest(self._static, text.encode()):
            return replace(self._public, has_key=True)
        key_id = keys.key_id_of(text)
        if key_id is not None:
            return await self._bearer(key_id, text)
        if await self._takes_anonymous():
            return self._public  # SDKs send some key or other, also where none is asked for
        raise Failure("AUTH_INVALID")

    async def _bearer(self, key_id: str, text: str) -> Caller:
        key = await self._look_up(key_id)
        now_s = wall_ms() / 1000
        if key is None or not key.opens_with(keys.hashed(self._pepper_for_checks(), text), now_s):
            raise Failure("AUTH_INVALID")
        if key.is_expired(now_s):
            raise Failure("AUTH_EXPIRED")
        await self._note_use(key_id, now_s)
        return self._caller(key)

    async def of_key(self, key_id: str) -> Caller:
        """Whose key it is, for who proved in another way to have been let in with it.

        Raises: Failure AUTH_INVALID, AUTH_EXPIRED, when it holds no longer.
        """
        if not key_id:
            return self._public
        key = await self._look_up(key_id)
        if key is None:
            raise Failure("AUTH_INVALID")
        if key.is_expired(wall_ms() / 1000):
            raise Failure("AUTH_EXPIRED")
        return self._caller(key)

    async def _takes_anonymous(self) -> bool:
        return self._settings.allow_anonymous or await self.is_open_here()

    async def is_open_here(self) -> bool:
        """Whether no key is asked for, since there is none and only this machine can connect.

        Raises: Failure BROKER_UNAVAILABLE.
        """
        if self._static or not is_loopback(self._settings.host):
            return False
        known, now = self._any_known, monotonic_s()
        if known is None or now - known[0] > KNOWN_S:
            known = self._any_known = (now, await self._store.has_any())
        return not known[1]

    async def _look_up(self, key_id: str) -> ApiKey | None:
        now = monotonic_s()
        known = self._known.get(key_id)
        if known is None or now - known[0] > KNOWN_S:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            known = self._known[key_id] = (now, await self._store.get(key_id))
        return known[1]

    async def _note_use(self, key_id: str, now_s: float) -> None:
        if now_s - self._noted.get(key_id, 0.0) < NOTE_USE_S:
            return
        self._noted[key_id] = now_s
        try:
            await self._store.note_use(key_id, int(now_s))
        except Failure:
            return  # Redis is away or full: the request itself will tell

    @property
    def _public(self) -> Caller:
        return replace(PUBLIC, tenant_hash=self._hash_of(PUBLIC.tenant))

    def _caller(self, key: ApiKey) -> Caller:
        return Caller(
            tenant=key.tenant,
            key_id=key.id,
            scopes=frozenset(key.scopes),
            models=frozenset(key.models),
            best_lane=key.best_lane,
            limits=key.limits,
            tenant_hash=self._hash_of(key.tenant),
            has_key=True,
        )

    def _hash_of(self, tenant: str) -> str:
        known = self._hashes.get((self._pepper, tenant))
        if known is None:
            if len(self._hashes) >= MAX_KNOWN:
                self._hashes.clear()
            known = keys.tenant_hash(self._pepper, tenant)
            self._hashes[self._pepper, tenant] = known
        return known

    def _pepper_for_checks(self) -> bytes:
        """It may have been drawn with the first key, after this gateway began."""
        self._pepper = self._pepper or self._read_pepper()
        if self._pepper is None:
            raise keys.no_pepper(self._settings.data_dir)
        return self._pepper

    def _read_pepper(self) -> bytes | None:
        settings = self._settings
        return keys.read_pepper(settings.key_pepper.get_secret_value(), settings.data_dir)


class Identification:
    """Puts the caller on each request, for :func:`caller_of`; refuses who may not call.

    A path that nobody thought of needs a key. ``refuse`` makes the answer of a failure.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        callers: Callers,
        tokens: StreamTokens,
        refuse: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._callers = callers
        self._tokens = tokens
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needed = scope_of(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if needed is None:
            await self._app(scope, receive, send)
            return
        try:
            caller = await self._identify(scope, needed)
        except Failure as failure:
            response = await self._refuse(Request(scope), failure)
            await response(scope, receive, send)
            return
        scope["headrace.caller"] = caller
        with structlog.contextvars.bound_contextvars(**_log_fields(caller)):
            await self._app(scope, receive, send)

    async def _identify(self, scope: Scope, needed: keys.Scope) -> Caller:
        headers = Headers(scope=scope)
        stream = token_in(scope) if "authorization" not in headers else None
        if stream is None:
            return await self._callers.identify(headers, needed)
        caller = await self._callers.of_key(await self._tokens.key_of(*stream))
        return checked(caller, needed)


def checked(caller: Caller, needed: keys.Scope) -> Caller:
    """The caller, who may do what needs this scope. Raises: Failure SCOPE_DENIED."""
    if needed not in caller.scopes:
        raise Failure("SCOPE_DENIED", f"This API key has no scope {needed}")
    return caller


def scope_of(method: str, path: str) -> keys.Scope | None:
    """What a request needs a key for; None: it needs none."""
    if path in _OPEN_PATHS or path == _PAGE or path.startswith(f"{_PAGE}/"):
        return None
    if path == "/" and method in ("GET", "HEAD"):
        return None
    for prefix, scope in _SCOPES_OF_PATHS.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return scope
    return "generate"


def _log_fields(caller: Caller) -> dict[str, str]:
    key = {"key_id": caller.key_id} if caller.key_id else {}
    return {"tenant_hash": caller.tenant_hash, **key}
