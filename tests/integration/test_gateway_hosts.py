"""A gateway of one machine alone is not to be called by the name of somebody's website."""

import pytest

from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.event_schema import captured_logs
from tests.support.fault_proxy import fault_proxy
from tests.support.gateway_app import RunningGateway, Stand

PROMPT = {"prompt": "hi", "max_tokens": 4}
ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/generate"),
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("GET", "/health"),
    ("GET", "/ui"),
    ("GET", "/nowhere"),
]
REBOUND = "rebound.example:8080"


async def status(gateway: RunningGateway, host: str, path: str = "/v1/models") -> int:
    return (await gateway.client.get(path, headers={"host": host})).status_code


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_foreign_name_is_refused_everywhere(stand: Stand, method: str, path: str) -> None:
    """With the name of the option, and one line in the log."""
    gateway = await stand.gateway()
    with captured_logs() as lines:
        answer = await gateway.client.request(method, path, json=PROMPT, headers={"host": REBOUND})
    assert answer.status_code == 403
    assert "HOST_NOT_ALLOWED" in answer.text.upper()
    for words in ("--allowed-hosts", "HEADRACE_ALLOWED_HOSTS", REBOUND):
        assert words in answer.text
    assert answer.headers["x-should-retry"] == "false"
    [line] = [line for line in lines if line["event"] == "gateway.rejected"]
    assert (line["code"], line["status"]) == ("HOST_NOT_ALLOWED", 403)


async def test_names_of_this_machine_are_let_in_with_any_port(stand: Stand) -> None:
    gateway = await stand.gateway()
    for host in ("localhost", "LocalHost:1", "127.0.0.1:99", "127.8.8.8", "[::1]:8080"):
        assert await status(gateway, host) == 200, host
    for host in ("localhost.example", "127.0.0.1.example", "10.0.0.1", "[::1", "x@localhost.evil"):
        assert await status(gateway, host) == 403, host


async def test_a_program_that_names_no_host_is_let_in(stand: Stand) -> None:
    """No browser is one of those."""
    gateway = await stand.gateway()
    async with gateway.connected() as (reader, writer):
        writer.write(b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert b" 200 " in await reader.readline()


async def test_more_names_can_be_allowed(stand: Stand) -> None:
    """Also for the operator's page, which asks for one of its own."""
    gateway = await stand.gateway(allowed_hosts=("AI.example",))
    for path in ("/v1/models", "/ops/dead"):
        assert await status(gateway, "ai.example:443", path) == 200
        assert await status(gateway, "other.example", path) == 403


async def test_with_keys_any_name_will_do(stand: Stand) -> None:
    """Of a gateway with a key of its own, and from the moment on that a pool has one."""
    guarded = await stand.gateway(api_key="k")
    answer = await guarded.client.get("/v1/models", headers={"host": REBOUND} | bearer("k"))
    assert answer.status_code == 200
    assert await status(guarded, REBOUND, "/health") == 200
    gateway = await stand.gateway(key_pepper=PEPPER)
    headers = {"host": REBOUND} | bearer(await make_key(stand.broker, "a"))
    assert (await gateway.client.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize("settings", [{"host": "10.0.0.7"}, {}])
async def test_who_serves_whoever_comes_is_called_as_it_may_be(
    stand: Stand, settings: dict[str, str]
) -> None:
    """As a service of a cluster, by its name there: by its callers, its probes and Prometheus."""
    await stand.worker()
    gateway = await stand.gateway(allow_anonymous=True, **settings)
    for path in ("/v1/models", "/health", "/ready", "/metrics"):
        assert await status(gateway, "gateway:8080", path) == 200


async def test_health_is_told_while_redis_is_away(stand: Stand) -> None:
    """Whether there are keys can not be known then, so names are not judged."""
    async with fault_proxy(stand.redis_url) as proxy:
        gateway = await stand.gateway(redis_url=proxy.url)
        await proxy.cut()
        assert await status(gateway, REBOUND, "/health") == 200
        assert await status(gateway, REBOUND) == 503
        await proxy.heal()
