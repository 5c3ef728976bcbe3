"""ops/redis: with TLS and its own user each role does its work, and nothing else."""

import asyncio
import hashlib
import subprocess
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis
from redis.exceptions import NoPermissionError, RedisError

from common.broker import Broker, connect
from common.broker.keys import prefix
from common.failures import Failure
from common.models.simulated import SIMULATED_MODEL
from common.overview import Overview, decode
from common.settings import Settings
from common.watching import keep_overview
from ops.status import look
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.processes import ROOT, free_port, processes
from tests.support.redis_server import Kind, server_binary
from tests.support.waiting import wait_until

ROLES = ("gateway", "worker", "background", "exporter", "admin")
KEY = prefix(SIMULATED_MODEL)


@dataclass
class GuardedServer:
    port: int
    scheme: str = "redis"
    query: str = ""

    def url(self, role: str, query: str | None = None) -> str:
        shown = self.query if query is None else query
        return f"{self.scheme}://{role}:password-of-{role}@127.0.0.1:{self.port}{shown}"

    def has_answered(self) -> bool:
        try:
            with Redis.from_url(self.url("admin")) as client:
                return bool(client.ping())
        except RedisError:
            return False


@asynccontextmanager
async def talking(url: str, *, single: bool = False) -> AsyncGenerator[Broker]:
    broker = Broker(connect(url, single=single), SIMULATED_MODEL)
    try:
        yield broker
    finally:
        await broker.close()


@contextmanager
def running(kind: Kind, home: Path, server: GuardedServer, *options: str) -> Generator[None]:
    """The server with users.acl, passwords filled in."""
    acl = (ROOT / "ops/redis/users.acl").read_text()
    for role in ROLES:
        digest = hashlib.sha256(f"password-of-{role}".encode()).hexdigest()
        acl = acl.replace(f"@{role.upper()}_SHA256@", digest)
    (home / "users.acl").write_text(acl)
    argv = [server_binary(kind), *options, "--dir", str(home), "--save", ""]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 15
        while not server.has_answered():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["valkey", "redis"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GuardedServer]:
    server = GuardedServer(free_port())
    acl_file = ("--aclfile", str(tmp_path / "users.acl"))
    with running(request.param, tmp_path, server, "--port", str(server.port), *acl_file):
        yield server


async def load(server: GuardedServer) -> None:
    async with talking(server.url("admin")) as broker:
        await broker.load()


async def test_each_role_does_its_work(
    server: GuardedServer, tmp_path: Path, simulated_data_dir: Path
) -> None:
    await load(server)
    async with talking(server.url("admin")) as admin:
        key = await make_key(admin, "a")
    settings: dict[str, Any] = {"data_dir": simulated_data_dir, "key_pepper": PEPPER}
    with processes(server.url("exporter"), tmp_path / "processes") as started:
        gateway = started.gateway(
            redis_url=server.url("gateway"), model=SIMULATED_MODEL, **settings
        )
        worker = started.worker(redis_url=server.url("worker"), simulated_first_token_ms=1)
        background = started.background(redis_url=server.url("background"))
        for process in (gateway, worker, background):
            await process.ready()
        async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as client:
            for path, body in (
                ("/generate", {"inputs": "hi", "parameters": {"max_new_tokens": 4}}),
                ("/v1/responses", {"input": "hi", "max_output_tokens": 4, "stream": True}),
            ):
                answer = await client.post(path, json=body, headers=bearer(key))
                assert answer.status_code == 200, answer.text
            stream = answer.headers["x-headrace-stream-id"]
            token = await client.post(f"/v1/streams/{stream}/token", headers=bearer(key))
            assert token.status_code == 200, token.text
            assert (await client.delete(f"/v1/streams/{stream}", headers=bearer(key))).is_success
        seen = await look(
            Settings(redis_url=server.url("exporter"), data_dir=tmp_path, model=SIMULATED_MODEL)
        )
        assert {process.role for process in seen.processes} == {"gateway", "worker"}
        async with talking(server.url("exporter")) as exporter:
            overview = await one_overview(exporter)
        assert [len(overview.workers), len(overview.gateways)] == [1, 1]
        for process in (gateway, worker, background):
            process.terminate()
            assert await process.ended() == 0
            assert process.errors() == ""


async def one_overview(broker: Broker) -> Overview:
    """What the exporter's loop writes, with its own rights."""
    writing = asyncio.create_task(keep_overview(broker, "exporter"))
    try:
        await wait_until(broker.overview_store.newest, what="an overview")
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
    found = await broker.overview_store.newest()
    assert found is not None
    return decode(found[1])


FORBIDDEN = [
    *(
        (role, *command)
        for role in ("gateway", "worker", "background", "exporter")
        for command in (
            ("FLUSHALL",),
            ("KEYS", "*"),
            ("SCAN", "0"),
            ("CONFIG", "GET", "*"),
            ("EVAL", "return 1", "0"),
            ("FUNCTION", "LOAD", "#!lua name=evil\nredis.register_function('f', function() end)"),
            ("FUNCTION", "FLUSH"),
            ("ACL", "LIST"),
            ("MONITOR",),
            ("GET", "somebody elses"),
            ("SET", "hr:other", "1"),
            ("HSET", "hr:{access}:keys", "0123456789ab", "forged"),
            ("SET", "hr:{access}:pepper", "forged"),
        )
    ),
    *((role, "HGETALL", "hr:{access}:keys") for role in ("worker", "background", "exporter")),
    *((role, "ZADD", "hr:background", "1", "job") for role in ("gateway", "worker", "exporter")),
    ("exporter", "HGET", f"{KEY}spec:x", "body"),
    ("exporter", "XRANGE", f"{KEY}log:x", "-", "+"),
    ("exporter", "GET", f"{KEY}doc:x"),
    ("exporter", "XREAD", "STREAMS", f"{KEY}inbox:g", "0"),
    ("exporter", "HSET", f"{KEY}gen:x", "st", "T"),
    ("exporter", "DEL", f"{KEY}gen:x"),
    ("exporter", "HGETALL", f"{KEY}dead:x"),
    ("exporter", "SET", f"{KEY}drain:x", "somebody"),
    ("exporter", "XADD", f"{KEY}dead", "*", "id", "x"),
    ("admin", "FLUSHALL"),
    ("admin", "KEYS", "*"),
    ("admin", "CONFIG", "SET", "maxmemory", "1"),
    ("admin", "ACL", "SETUSER", "evil"),
    ("admin", "SHUTDOWN"),
    ("admin", "GET", "somebody elses"),
]


async def test_no_role_does_more(server: GuardedServer) -> None:
    for role, *command in FORBIDDEN:
        with Redis.from_url(server.url(role)) as client:
            try:
                client.execute_command(*command)
            except NoPermissionError:
                continue
            pytest.fail(f"{role} may {' '.join(command)}")
    with Redis(port=server.port) as nobody, pytest.raises(RedisError, match="uthentication"):
        nobody.ping()


@pytest.mark.parametrize("single", [False, True])
async def test_who_may_not_load_the_functions_says_who_must(
    server: GuardedServer, *, single: bool
) -> None:
    async with talking(server.url("gateway"), single=single) as gateway:
        with pytest.raises(Failure, match="headrace doctor --load") as refused:
            await gateway.load()
        assert refused.value.code == "ACCESS_MISCONFIGURED"
        await load(server)
        await gateway.load()
        assert (await gateway.state()).workers == []


def test_a_file_without_its_passwords_starts_no_server(tmp_path: Path) -> None:
    template = str(ROOT / "ops/redis/users.acl")
    done = subprocess.run(
        [server_binary("valkey"), "--port", str(free_port()), "--aclfile", template],
        capture_output=True,
        timeout=20,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode != 0


# TLS ---------------------------------------------------------------------------------------------


async def test_with_tls_only_those_who_know_the_authority_talk(tmp_path: Path) -> None:
    """Debian's Redis, as ops/redis/redis.conf sets it up; the embedded server has no TLS."""
    authority = make_authority(tmp_path, "ca")
    make_authority(tmp_path, "other")
    sign(tmp_path, "server")
    server = GuardedServer(free_port(), "rediss", f"?ssl_ca_certs={authority}")
    conf = (ROOT / "ops/redis/redis.conf").read_text()
    for there, here in (
        ("tls-port 6379", f"tls-port {server.port}"),
        ("/etc/redis/tls", str(tmp_path)),
        ("/etc/redis", str(tmp_path)),
    ):
        assert there in conf
        conf = conf.replace(there, here)
    (tmp_path / "redis.conf").write_text(conf)
    with running("redis", tmp_path, server, str(tmp_path / "redis.conf")):
        await load(server)
        for single in (False, True):
            async with talking(server.url("gateway"), single=single) as broker:
                assert (await broker.state()).gateways == []
        for url in (
            server.url("gateway", query=f"?ssl_ca_certs={tmp_path / 'other.crt'}"),
            GuardedServer(server.port).url("gateway"),
        ):
            async with talking(url) as stranger:
                with pytest.raises(Failure) as refused:
                    await stranger.state()
                assert refused.value.code == "BROKER_UNAVAILABLE"


def make_authority(home: Path, name: str) -> Path:
    openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"),
        *("-keyout", str(home / f"{name}.key"), "-out", str(home / f"{name}.crt")),
    )
    return home / f"{name}.crt"


def sign(home: Path, name: str) -> None:
    """A certificate of the authority ``ca`` for this machine."""
    request = home / f"{name}.csr"
    openssl(
        *("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
        *("-keyout", str(home / f"{name}.key"), "-out", str(request)),
    )
    openssl(
        *("x509", "-req", "-in", str(request), "-days", "2", "-copy_extensions", "copy"),
        *("-CA", str(home / "ca.crt"), "-CAkey", str(home / "ca.key"), "-CAcreateserial"),
        *("-out", str(home / f"{name}.crt")),
    )


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
