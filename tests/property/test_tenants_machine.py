"""Two tenants on the wire: nothing that one does ever shows, or changes, anything of the other.

Hypothesis draws what both do, on two gateways with a real server behind them; the worker tells each
tenant its secret. Whatever a tenant is answered holds no secret and no id of the other one, and who
names what belongs to the other is answered as if it had never been.
"""

import asyncio
import secrets
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from common.broker import Broker, connect
from common.files import new_file_id
from common.ids import new_request_id, request_of
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.depth import searched
from tests.support.gateway_app import RunningGateway, Stand
from tests.support.models import simulated
from tests.support.redis_server import RedisServer
from tests.support.scripted_worker import ScriptedWorker

T = TypeVar("T")

SHORT = {"max_new_tokens": 8}
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"inputs": "hi", "parameters": SHORT},
    "/generate_stream": {"inputs": "hi", "parameters": SHORT},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
    "/v1/completions": {"prompt": "hi", "stream": True, "max_tokens": 8},
    "/v1/responses": {"input": "hi", "max_output_tokens": 8},
}
UNLIKE = {"date", "x-request-id", "traceresponse", "content-length"}
"""Headers that differ between any two answers; the length where an id of another length is told."""

tenants = st.sampled_from((0, 1))
doors = st.sampled_from((0, 1))
picks = st.integers(0, 30)


class World:
    """Two gateways and a worker, for all examples; tenants are new in each."""

    def __init__(self, url: str, data_dir: Path) -> None:
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self.secrets: dict[str, str] = {}
        self.do(self._open(url, data_dir))

    async def _open(self, url: str, data_dir: Path) -> None:
        manifest = simulated(data_dir).manifest
        self.broker = Broker(connect(url), manifest.name)
        await self.broker.load()
        stand = Stand(url, data_dir, self._stack, self.broker, manifest.version)
        self.gateways = [await stand.gateway(key_pepper=PEPPER) for _ in range(2)]
        self.worker: ScriptedWorker = await stand.worker()

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(call)

    def close(self) -> None:
        async def close() -> None:
            await self._stack.aclose()
            await self.broker.close()

        self.do(close())
        self._runner.close()

    async def work(self) -> None:
        """Whatever waits is answered with the secret of its tenant."""
        while sum((await self.broker.state()).waiting.values()):
            turn = await self.worker.take()
            await turn.say(self.secrets[turn.spec.tenant])
            await turn.end()


class Tenant:
    def __init__(self, world: World, name: str) -> None:
        self.name = f"{name}-{secrets.token_hex(4)}"
        self.secret = f"secret-of-{secrets.token_hex(8)}"
        scopes = ("generate", "batch")
        self.headers = bearer(world.do(make_key(world.broker, self.name, scopes=scopes)))
        self.ids: list[str] = []
        """Requests that were admitted."""
        self.files: list[str] = []
        world.secrets[self.name] = self.secret


class TenantsMachine(RuleBasedStateMachine):
    world: World

    def __init__(self) -> None:
        super().__init__()
        self.tenants = [Tenant(self.world, "ann"), Tenant(self.world, "bob")]

    def teardown(self) -> None:
        self.world.do(self.world.work())

    # What each does with its own -----------------------------------------------------------------

    @rule(
        who=tenants,
        door=doors,
        path=st.sampled_from(list(BODIES)),
        key=st.sampled_from((None, "k", "l")),
    )
    def asks(self, who: int, door: int, path: str, key: str | None) -> None:
        """Both know the same idempotency keys, and each finds its own answers under them."""
        headers = {"idempotency-key": key + path} if key else {}
        answer = self._do(who, door, "POST", path, json=BODIES[path], headers=headers)
        assert answer.status_code == 200, answer.text
        assert self.tenants[who].secret in answer.text
        self._note(who, answer)

    @rule(who=tenants, door=doors, is_stored=st.booleans())
    def asks_and_leaves(self, who: int, door: int, is_stored: bool) -> None:
        """So that something waits: a response in the background, or a stream without its reader."""
        headers = self.tenants[who].headers | {"x-headrace-disconnect": "continue"}
        path, body = "/generate_stream", BODIES["/generate_stream"]
        if is_stored:
            path, body = "/v1/responses", BODIES["/v1/responses"] | {"background": True}
        gateway = self.world.gateways[door]
        answer = self.world.do(_begin(gateway, path, body, headers))
        assert answer.status_code == 200
        self._note(who, answer)

    @rule()
    def worker_works(self) -> None:
        self.world.do(self.world.work())

    @precondition(lambda self: any(tenant.ids for tenant in self.tenants))
    @rule(who=tenants, door=doors, which=picks)
    def reads_again(self, who: int, door: int, which: int) -> None:
        """What is one's own is there for the same steps that do not find it for the other."""
        tenant = self.tenants[who]
        if tenant.ids:
            id = tenant.ids[which % len(tenant.ids)]
            answer = self._do(who, door, "HEAD", f"/v1/streams/{id}")
            assert answer.status_code in (200, 204)

    @rule(who=tenants, door=doors)
    def uploads(self, who: int, door: int) -> None:
        """A file that holds the secret, under a name that does, too."""
        tenant = self.tenants[who]
        form = {"file": (f"{tenant.secret}.jsonl", tenant.secret.encode())}
        purpose = {"purpose": "batch"}
        answer = self._do(who, door, "POST", "/v1/files", files=form, data=purpose)
        assert answer.status_code == 200, answer.text
        tenant.files.append(answer.json()["id"])

    @rule(who=tenants, door=doors, which=picks)
    def deletes(self, who: int, door: int, which: int) -> None:
        files = self.tenants[who].files
        if files:
            id = files.pop(which % len(files))
            assert self._do(who, door, "DELETE", f"/v1/files/{id}").status_code == 200

    @rule(who=tenants, door=doors)
    def lists(self, who: int, door: int) -> None:
        """Its own files, all of them, as they were, and no others."""
        tenant = self.tenants[who]
        answer = self._do(who, door, "GET", "/v1/files?order=asc")
        assert [file["id"] for file in answer.json()["data"]] == tenant.files
        for id in tenant.files[-2:]:
            content = self._do(who, door, "GET", f"/v1/files/{id}/content")
            assert content.text == tenant.secret

    # What each tries with what is the other's ----------------------------------------------------

    @precondition(lambda self: any(tenant.ids for tenant in self.tenants))
    @rule(
        who=tenants,
        door=doors,
        which=picks,
        what=st.sampled_from(
            (
                ("GET", "/v1/streams/{}", None),
                ("HEAD", "/v1/streams/{}", None),
                ("GET", "/v1/streams/{}?after=3-00000000", None),
                ("DELETE", "/v1/streams/{}", None),
                ("POST", "/v1/streams/{}/token", {}),
                ("GET", "/v1/responses/resp_{}", None),
                ("GET", "/v1/responses/resp_{}?stream=true", None),
                ("GET", "/v1/responses/resp_{}/input_items", None),
                ("POST", "/v1/responses/resp_{}/cancel", {}),
                ("DELETE", "/v1/responses/resp_{}", None),
                ("POST", "/v1/responses", {"input": "hi", "previous_response_id": "resp_{}"}),
            )
        ),
    )
    def intrudes(self, who: int, door: int, which: int, what: tuple[str, str, Any]) -> None:
        other = self.tenants[1 - who]
        if not other.ids:
            return
        id, never = other.ids[which % len(other.ids)], new_request_id()
        before = self.world.do(self._states(other))
        theirs, nobodys = self._try(who, door, id, what), self._try(who, door, never, what)
        assert theirs.status_code == nobodys.status_code
        assert theirs.status_code in (400, 404, 405, 410)
        assert theirs.text.replace(id, never) == nobodys.text
        assert _shown(theirs) == _shown(nobodys)
        assert self.world.do(self._states(other)) == before

    def _try(self, who: int, door: int, id: str, what: tuple[str, str, Any]) -> httpx.Response:
        method, path, body = what
        if body is not None:
            body = {name: value.format(id) for name, value in body.items()}
        answer = self.world.do(self._send(who, door, method, path.format(id), json=body))
        self._check(who, answer, sent=id)
        return answer

    @precondition(lambda self: any(tenant.files for tenant in self.tenants))
    @rule(
        who=tenants,
        door=doors,
        which=picks,
        what=st.sampled_from(
            (
                ("GET", "/v1/files/{}", None),
                ("HEAD", "/v1/files/{}", None),
                ("GET", "/v1/files/{}/content", None),
                ("DELETE", "/v1/files/{}", None),
                ("GET", "/v1/files?after={}", None),
            )
        ),
    )
    def intrudes_on_files(
        self, who: int, door: int, which: int, what: tuple[str, str, Any]
    ) -> None:
        files = self.tenants[1 - who].files
        if not files:
            return
        id, never = files[which % len(files)], new_file_id()
        theirs, nobodys = self._try(who, door, id, what), self._try(who, door, never, what)
        assert theirs.status_code == nobodys.status_code
        assert theirs.status_code in (400, 404)
        assert theirs.text.replace(id, never) == nobodys.text
        assert _shown(theirs) == _shown(nobodys)
        assert self._do(1 - who, door, "GET", f"/v1/files/{id}").status_code == 200

    @rule(
        who=tenants, door=doors, path=st.sampled_from(("/v1/models", "/info", "/ready", "/health"))
    )
    def looks_around(self, who: int, door: int, path: str) -> None:
        self._do(who, door, "GET", path)

    # ---------------------------------------------------------------------------------------------

    def _do(self, who: int, door: int, method: str, path: str, **options: Any) -> httpx.Response:
        """Send it, let the worker work meanwhile, and check what comes back."""
        answer = self.world.do(self._while_working(self._send(who, door, method, path, **options)))
        self._check(who, answer)
        return answer

    async def _send(
        self, who: int, door: int, method: str, path: str, **options: Any
    ) -> httpx.Response:
        gateway: RunningGateway = self.world.gateways[door]
        headers = self.tenants[who].headers | options.pop("headers", {})
        return await gateway.client.request(method, path, headers=headers, **options)

    async def _while_working(self, asking: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
        task = asyncio.create_task(asking)
        while not task.done():
            await self.world.work()
            await asyncio.wait({task}, timeout=0.002)
        return await task

    def _check(self, who: int, answer: httpx.Response, sent: str = "") -> None:
        other = self.tenants[1 - who]
        told = answer.text + repr(answer.headers.raw)
        assert other.secret not in told
        assert other.name not in told
        assert not [id for id in other.ids + other.files if id in told and id != sent]

    def _note(self, who: int, answer: httpx.Response) -> None:
        id = answer.headers["x-headrace-stream-id"]
        assert id not in self.tenants[1 - who].ids
        if id not in self.tenants[who].ids:
            self.tenants[who].ids.append(id)

    async def _states(self, tenant: Tenant) -> list[Any]:
        looks = await self.world.broker.look("nobody", [f"{id}.0" for id in tenant.ids])
        return [(request_of(look.id), look.state, look.next) for look in looks]


async def _begin(
    gateway: RunningGateway, path: str, body: dict[str, Any], headers: dict[str, str]
) -> httpx.Response:
    """The beginning of an answer; its reader leaves at once."""
    async with gateway.client.stream("POST", path, json=body, headers=headers) as answer:
        return answer


def _shown(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in UNLIKE}


@pytest.fixture
def world(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(redis_server.url, tmp_path_factory.mktemp("data"))
    yield world
    world.close()


def test_nothing_that_one_tenant_does_shows_anything_of_the_other(world: World) -> None:
    machine = type("Machine", (TenantsMachine,), {"world": world})
    run_state_machine_as_test(machine, settings=searched(20, steps=20))
