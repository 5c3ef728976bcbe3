"""Keys on the wire: who is let in, to what, and that tenants do not see one another."""

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from common import keys
from common.failures import Failure
from common.ids import new_request_id
from common.keys import Limits
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.gateway_app import RunningGateway, Stand
from tests.support.processes import Processes
from tests.support.waiting import wait_until

GENERATE = {"inputs": "hi", "parameters": {"max_new_tokens": 4}}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.fixture
async def gateway(stand: Stand) -> RunningGateway:
    return await stand.gateway(key_pepper=PEPPER)


async def status(gateway: RunningGateway, path: str, key: str = "", method: str = "GET") -> int:
    headers = bearer(key) if key else {}
    return (await gateway.client.request(method, path, headers=headers)).status_code


# Who is let in -----------------------------------------------------------------------------------


async def test_without_keys_everybody_on_loopback_is_let_in(gateway: RunningGateway) -> None:
    """Also with the invented keys that SDKs insist on sending."""
    assert await status(gateway, "/v1/models") == 200
    assert await status(gateway, "/v1/models", "sk-none") == 200
    assert await status(gateway, "/metrics") == 200


async def test_as_soon_as_there_is_a_key_one_is_needed(
    stand: Stand, gateway: RunningGateway
) -> None:
    assert await status(gateway, "/v1/models") == 200
    key = await make_key(stand.broker, "a")
    await wait_until(lambda: _is(gateway, "/v1/models", 401), what="the gateway asks for keys")
    assert await status(gateway, "/v1/models", key) == 200
    for path in ("/health", "/ready", "/ui/", "/ops/", "/"):
        assert await status(gateway, path) != 401, path


async def _is(gateway: RunningGateway, path: str, expected: int, key: str = "") -> bool:
    return await status(gateway, path, key) == expected


async def test_both_wires_refuse_in_their_own_envelope(
    stand: Stand, gateway: RunningGateway
) -> None:
    key = await make_key(stand.broker, "a")
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
    for headers, code in (({}, "AUTH_MISSING"), (bearer(wrong), "AUTH_INVALID")):
        tgi = await gateway.client.post("/generate", json=GENERATE, headers=headers)
        assert (tgi.status_code, tgi.json()["code"]) == (401, code)
        assert tgi.json()["error_type"] == "authentication"
        chat = await gateway.client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert chat.status_code == 401
        assert chat.json()["error"]["code"] == "invalid_api_key"
        assert chat.json()["error"]["type"] == "invalid_request_error"
        for answer in (tgi, chat):
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-should-retry"] == "false"
            assert wrong not in answer.text
    for header in ("Basic abc", "Bearer", "Bearer sk-other", key):
        answer = await gateway.client.get("/v1/models", headers={"authorization": header})
        assert answer.status_code == 401, header


async def test_a_revoked_key_is_refused_within_a_second_on_every_gateway(stand: Stand) -> None:
    """Whatever is asked more than a second after the revocation is refused."""
    gateways = [await stand.gateway(key_pepper=PEPPER) for _ in range(2)]
    await make_key(stand.broker, "other")
    key = await make_key(stand.broker, "a")
    for gateway in gateways:
        assert await status(gateway, "/v1/models", key) == 200
    assert await stand.broker.key_store.remove(key.split("-")[2])
    revoked_at = time.monotonic()
    for gateway in gateways:
        while True:
            began_at = time.monotonic()
            if await status(gateway, "/v1/models", key) == 401:
                break
            assert began_at - revoked_at < 1.0
            await asyncio.sleep(0.02)


async def test_an_expired_key_says_so(stand: Stand, gateway: RunningGateway) -> None:
    key = await make_key(stand.broker, "a", expires_s=int(time.time()) - 1)
    answer = await gateway.client.post("/generate", json=GENERATE, headers=bearer(key))
    assert (answer.status_code, answer.json()["code"]) == (401, "AUTH_EXPIRED")


async def test_after_a_rotation_the_old_secret_holds_for_its_time(
    stand: Stand, gateway: RunningGateway
) -> None:
    old = keys.new_key_text("0123456789ab")
    old_hash, now_s = keys.hashed(PEPPER.encode(), old), int(time.time())
    fields: dict[str, Any] = {"id": "0123456789ab", "old_hash": old_hash}
    await make_key(stand.broker, "a", **fields, old_until_s=now_s + 60)
    assert await status(gateway, "/v1/models", old) == 200
    await make_key(stand.broker, "a", **fields, old_until_s=now_s - 1)
    await wait_until(lambda: _is(gateway, "/v1/models", 401, old), what="the old secret's end")


async def test_when_a_key_was_last_used_is_known(stand: Stand, gateway: RunningGateway) -> None:
    key, unused = await make_key(stand.broker, "a"), await make_key(stand.broker, "b")
    assert await status(gateway, "/v1/models", key) == 200
    used = {found.id: used_s for found, used_s in await stand.broker.key_store.all()}
    assert abs(used[key.split("-")[2]] - time.time()) < 60
    assert used[unused.split("-")[2]] == 0


async def test_one_static_key_is_for_everything_as_in_tgi(stand: Stand) -> None:
    gateway = await stand.gateway(api_key="open sesame")
    assert await status(gateway, "/v1/models") == 401
    assert await status(gateway, "/v1/models", "open") == 401
    assert await status(gateway, "/v1/models", "open sesame") == 200
    assert await status(gateway, "/metrics", "open sesame") == 200
    assert await status(gateway, "/health") == 200


async def test_keys_that_can_not_be_checked_let_nobody_in(stand: Stand) -> None:
    """With another pepper, or none, every key would be unknown: the operator has to hear of it."""
    key = await make_key(stand.broker, "a")
    gateway = await stand.gateway()
    answer = await gateway.client.post("/generate", json=GENERATE, headers=bearer(key))
    assert (answer.status_code, answer.json()["code"]) == (503, "ACCESS_MISCONFIGURED")
    with pytest.raises(Failure, match="no pepper"):
        await gateway.services.callers.check()
    other = await stand.gateway(key_pepper="q" * 32)
    with pytest.raises(Failure, match="another pepper"):
        await other.services.callers.check()


async def test_only_a_guarded_gateway_starts_for_others(stand: Stand) -> None:
    async def check(**settings: Any) -> None:
        gateway = await stand.gateway(key_pepper=PEPPER, **settings)
        await gateway.services.callers.check()

    await check()
    with pytest.raises(Failure, match="headrace keys create") as caught:
        await check(host="0.0.0.0")  # noqa: S104 - the tests' own listener is on loopback
    assert caught.value.code == "ACCESS_MISCONFIGURED"
    await check(host="0.0.0.0", allow_anonymous=True)  # noqa: S104
    await check(host="0.0.0.0", api_key="secret")  # noqa: S104
    await make_key(stand.broker, "a")
    await check(host="0.0.0.0")  # noqa: S104


async def test_the_process_says_why_it_does_not_start(
    started: Processes, simulated_data_dir: Path
) -> None:
    settings: dict[str, Any] = {"data_dir": simulated_data_dir, "model": "simulated"}
    refused = started.gateway(host="0.0.0.0", **settings)  # noqa: S104 - it does not listen
    assert await refused.ended() == 1
    assert refused.errors() == (
        "headrace gateway: Whoever reaches 0.0.0.0 could use this gateway. Make a key first "
        "(headrace keys create TENANT), or say --allow-anonymous\n"
    )


async def test_a_gateway_for_others_asks_for_keys_even_when_the_last_one_is_gone(
    stand: Stand,
) -> None:
    gateway = await stand.gateway(key_pepper=PEPPER, host="0.0.0.0")  # noqa: S104
    assert await status(gateway, "/v1/models") == 401


async def test_anonymous_callers_may_be_let_in_beside_keys(stand: Stand) -> None:
    gateway = await stand.gateway(key_pepper=PEPPER, allow_anonymous=True)
    key = await make_key(stand.broker, "a")
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
    assert await status(gateway, "/v1/models") == 200
    assert await status(gateway, "/v1/models", key) == 200
    assert await status(gateway, "/v1/models", wrong) == 401, "a wrong key is not nobody's"


# What a key is for -------------------------------------------------------------------------------


async def test_a_scope_opens_its_own_paths_only(stand: Stand, gateway: RunningGateway) -> None:
    generate = await make_key(stand.broker, "a")
    metrics = await make_key(stand.broker, "a", scopes=("metrics",))
    assert await status(gateway, "/metrics", generate) == 403
    assert await status(gateway, "/metrics", metrics) == 200
    answer = await gateway.client.post("/v1/completions", json={}, headers=bearer(metrics))
    assert answer.status_code == 403
    assert answer.json()["error"]["type"] == "permission_error"
    assert answer.json()["error"]["code"] == "scope_denied"


async def test_a_key_for_other_models_is_refused_and_sees_none(
    stand: Stand, gateway: RunningGateway
) -> None:
    key = await make_key(stand.broker, "a", models=("another",))
    answer = await gateway.client.post("/v1/chat/completions", json=CHAT, headers=bearer(key))
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "model_not_allowed"
    assert answer.json()["error"]["param"] == "model"
    listed = await gateway.client.get("/v1/models", headers=bearer(key))
    assert listed.json()["data"] == []
    assert await status(gateway, "/v1/models/simulated", key) == 404
    allowed = await make_key(stand.broker, "a", models=("simulated",))
    assert await status(gateway, "/v1/models/simulated", allowed) == 200


async def test_a_tier_above_the_keys_lane_is_lowered_and_the_answer_says_so(
    stand: Stand, gateway: RunningGateway
) -> None:
    worker = await stand.worker()
    key = await make_key(stand.broker, "a", best_lane="flex")
    body = CHAT | {"service_tier": "priority"}
    asking = asyncio.create_task(
        gateway.client.post("/v1/chat/completions", json=body, headers=bearer(key))
    )
    await wait_until(lambda: _waits_in(stand, "flex"), what="a generation in the lane flex")
    await (await worker.take()).end()
    assert (await asking).json()["service_tier"] == "flex"


async def test_a_response_too_names_the_lane_it_was_given(
    stand: Stand, gateway: RunningGateway
) -> None:
    worker = await stand.worker()
    key = await make_key(stand.broker, "a", best_lane="flex")
    body = {"input": "hi", "service_tier": "priority", "max_output_tokens": 4}
    asking = asyncio.create_task(
        gateway.client.post("/v1/responses", json=body, headers=bearer(key))
    )
    await (await worker.take()).end()
    assert (await asking).json()["service_tier"] == "flex"


async def _waits_in(stand: Stand, lane: str) -> bool:
    return (await stand.broker.state()).waiting[lane] == 1


# How much ---------------------------------------------------------------------------------------


async def test_answers_tell_what_is_left_and_refusals_when_to_come_again(
    stand: Stand, gateway: RunningGateway
) -> None:
    worker = await stand.worker()
    limits = Limits(requests_per_minute=2, tokens_per_minute=6_000)
    key = await make_key(stand.broker, "a", limits=limits)
    for left in ("1", "0"):
        asking = asyncio.create_task(
            gateway.client.post("/v1/chat/completions", json=CHAT, headers=bearer(key))
        )
        await (await worker.take()).end()
        headers = (await asking).headers
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-remaining-requests"] == left
        assert headers["x-ratelimit-limit-tokens"] == "6000"
        assert 5_900 < int(headers["x-ratelimit-remaining-tokens"]) < 6_000
        assert re.fullmatch(r"(1m0|[2-5]\d(\.\d+)?)s", headers["x-ratelimit-reset-requests"])
    for path, body in (("/v1/chat/completions", CHAT), ("/generate_stream", GENERATE)):
        refused = await gateway.client.post(path, json=body, headers=bearer(key))
        assert refused.status_code == 429
        assert refused.headers["x-should-retry"] == "true"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert int(refused.headers["retry-after-ms"]) <= 30_000
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.json()["code"] == "RATE_LIMITED"
    chat = await gateway.client.post("/v1/chat/completions", json=CHAT, headers=bearer(key))
    assert chat.json()["error"]["code"] == "rate_limit_exceeded"
    assert chat.json()["error"]["type"] == "rate_limit_error"


async def test_what_no_minute_holds_is_refused_for_good(
    stand: Stand, gateway: RunningGateway
) -> None:
    await stand.worker()
    key = await make_key(stand.broker, "a", limits=Limits(tokens_per_minute=5))
    answer = await gateway.client.post("/v1/chat/completions", json=CHAT, headers=bearer(key))
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "insufficient_quota"
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers


async def test_several_prompts_are_one_request_and_as_many_open_ones(
    stand: Stand, gateway: RunningGateway
) -> None:
    """And are refused together: the first of them then costs nothing."""
    await stand.worker()
    key = await make_key(stand.broker, "a", limits=Limits(requests_per_minute=1, streams=1))
    body = {"prompt": ["a", "b"], "max_tokens": 4}
    refused = await gateway.client.post("/v1/completions", json=body, headers=bearer(key))
    assert refused.status_code == 429
    assert "1 at once" in refused.json()["error"]["message"]
    await wait_until(lambda: _waits_for_nobody(stand), what="the withdrawal of the first prompt")


async def _waits_for_nobody(stand: Stand) -> bool:
    return sum((await stand.broker.state()).waiting.values()) == 0


# Tenants -----------------------------------------------------------------------------------------


async def test_the_stream_of_another_tenant_is_as_one_that_never_was(
    stand: Stand, gateway: RunningGateway
) -> None:
    worker = await stand.worker()
    a, b = await make_key(stand.broker, "a"), await make_key(stand.broker, "b")
    request = gateway.client.build_request(
        "POST", "/generate_stream", json=GENERATE, headers=bearer(a)
    )
    response = await gateway.client.send(request, stream=True)
    turn = await worker.take()
    await turn.say("secret")
    stream_id = response.headers["x-headrace-stream-id"]
    for method in ("GET", "HEAD", "DELETE"):
        theirs = await _ask(gateway, method, stream_id, b)
        never = await _ask(gateway, method, new_request_id(), b)
        assert theirs.status_code == never.status_code == 404
        assert theirs.content == never.content
        assert _shown_headers(theirs) == _shown_headers(never)
    assert stream_id in gateway.services.relay._recent.ids(), "still kept, should Redis forget it"
    colleague = await make_key(stand.broker, "a")
    await turn.say("!", finish="length")
    assert (await _ask(gateway, "HEAD", stream_id, colleague)).status_code == 200
    assert "secret!" in (await _ask(gateway, "GET", stream_id, a)).text
    await response.aclose()


async def _ask(gateway: RunningGateway, method: str, stream_id: str, key: str) -> httpx.Response:
    return await gateway.client.request(method, f"/v1/streams/{stream_id}", headers=bearer(key))


def _shown_headers(answer: httpx.Response) -> dict[str, str]:
    return {
        k: v
        for k, v in answer.headers.items()
        if k not in ("date", "traceresponse", "x-request-id")
    }


async def test_each_generation_carries_its_tenant_to_the_worker(
    stand: Stand, gateway: RunningGateway
) -> None:
    """By which prefixes are kept apart and lanes are shared fairly."""
    worker = await stand.worker()
    key = await make_key(stand.broker, "tenant-1")
    asking = asyncio.create_task(
        gateway.client.post("/generate", json=GENERATE, headers=bearer(key))
    )
    turn = await worker.take()
    assert turn.spec.tenant == "tenant-1"
    await turn.end()
    assert (await asking).status_code == 200
