"""The relay heals what goes wrong between Redis and a client, who sees a pause or nothing."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from common.broker import connection as connection_module
from common.broker import keys
from gateway import relay as relay_module
from gateway.sse import EventStream
from gateway.stream import Stream
from ops.bench.sse_client import Event, read_events
from tests.support.fault_proxy import fault_proxy
from tests.support.gateway_app import RunningGateway, Stand
from tests.support.redis_server import RawRedis, RedisServer
from tests.support.scripted_worker import ScriptedWorker, Turn
from tests.support.waiting import wait_until

BODY = {"inputs": "hi", "parameters": {"details": True}}


@dataclass
class Scene:
    """A stream that has shown its first token."""

    worker: ScriptedWorker
    gateway: RunningGateway
    response: httpx.Response
    events: AsyncIterator[Event]
    turn: Turn
    stream_id: str

    async def next_text(self, within_s: float = 15) -> str:
        event = await asyncio.wait_for(anext(self.events), within_s)
        return event.json["token"]["text"]

    async def rest(self, within_s: float = 15) -> list[Event]:
        async with asyncio.timeout(within_s):
            return [event async for event in self.events]


@asynccontextmanager
async def streaming(
    stand: Stand, gateway: RunningGateway, headers: dict[str, str] | None = None
) -> AsyncGenerator[Scene]:
    worker = await stand.worker()
    async with gateway.client.stream(
        "POST", "/generate_stream", json=BODY, headers=headers
    ) as response:
        stream_id = response.headers["x-headrace-stream-id"]
        turn = await worker.take()
        await turn.say("a")
        scene = Scene(worker, gateway, response, read_events(response), turn, stream_id)
        assert await scene.next_text() == "a"
        yield scene


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[RawRedis]:
    client: RawRedis = Redis.from_url(redis_url)
    yield client
    await client.aclose()


def inbox_of(gateway: RunningGateway) -> str:
    return keys.inbox(keys.prefix("simulated", 0), gateway.name)


async def test_a_lost_last_record_is_found_by_the_tail_check(stand: Stand, raw: RawRedis) -> None:
    """The end was published, but not into this inbox: nothing live would ever follow it."""
    gateway = await stand.gateway()
    async with streaming(stand, gateway) as scene:
        await raw.xtrim(inbox_of(gateway), maxlen=0, approximate=False)
        await _unsubscribe(raw, gateway, scene)
        await scene.turn.say("b", finish="length")
        last = await scene.rest()
    assert last[-1].json["generated_text"] == "ab"


async def test_a_lost_record_in_the_middle_is_read_from_the_log(
    stand: Stand, raw: RawRedis
) -> None:
    gateway = await stand.gateway()
    async with streaming(stand, gateway) as scene:
        await _unsubscribe(raw, gateway, scene)
        await scene.turn.say("b")
        await _subscribe(raw, gateway, scene)
        await scene.turn.say("c")
        assert [await scene.next_text(), await scene.next_text()] == ["b", "c"]


async def test_a_forgotten_subscription_is_made_again(stand: Stand, raw: RawRedis) -> None:
    gateway = await stand.gateway()
    async with streaming(stand, gateway) as scene:
        await _unsubscribe(raw, gateway, scene)

        async def is_subscribed() -> bool:
            look = await stand.broker.look(gateway.name, [f"{scene.stream_id}.0"])
            return look[0].subscribed

        await wait_until(is_subscribed)
        await scene.turn.say("b")
        assert await scene.next_text() == "b"


async def test_an_inbox_that_vanished_is_made_again(stand: Stand, raw: RawRedis) -> None:
    gateway = await stand.gateway()
    async with streaming(stand, gateway) as scene:
        await raw.delete(inbox_of(gateway))
        await scene.turn.say("b")
        assert await scene.next_text() == "b"

        async def exists() -> bool:
            return bool(await raw.exists(inbox_of(gateway)))

        await wait_until(exists, what="a new inbox")
        await scene.turn.say("c")
        assert await scene.next_text() == "c"


async def test_a_broken_connection_costs_a_pause(stand: Stand, redis_url: str) -> None:
    async with fault_proxy(redis_url) as proxy:
        gateway = await stand.gateway(redis_url=proxy.url)
        async with streaming(stand, gateway) as scene:
            await proxy.cut()
            await scene.turn.say("b")
            await proxy.heal()
            assert await scene.next_text() == "b"
            await scene.turn.say("c", finish="length")
            assert (await scene.rest())[-1].json["generated_text"] == "abc"


async def test_a_reader_of_the_log_waits_for_redis_too(stand: Stand, redis_url: str) -> None:
    async with fault_proxy(redis_url) as proxy:
        gateway = await stand.gateway(redis_url=proxy.url)
        async with streaming(stand, gateway) as scene:
            await proxy.cut()
            _only_stream(gateway).read_on()
            await scene.turn.say("b")
            await wait_until(lambda: gateway.services.relay._is_away)
            await proxy.heal()
            assert await scene.next_text() == "b"


async def test_a_connection_that_hangs_is_given_up(
    stand: Stand, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is closed and nothing comes: as when a machine in between has gone."""
    monkeypatch.setattr(connection_module, "_COMMAND_TIMEOUT_S", 1.2)
    async with fault_proxy(redis_url) as proxy:
        gateway = await stand.gateway(redis_url=proxy.url)
        async with streaming(stand, gateway) as scene:
            proxy.stall("to_client")
            await scene.turn.say("b")
            await wait_until(lambda: gateway.services.relay._is_away)
            proxy.flow()
            assert await scene.next_text() == "b"
            await scene.turn.say("c", finish="length")
            assert (await scene.rest())[-1].json["generated_text"] == "abc"


async def test_a_client_is_told_when_redis_stays_away_and_may_resume(
    stand: Stand, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error frame without an id: the cursor of the last token stays the place to go on from."""
    monkeypatch.setattr(relay_module, "AWAY_LIMIT_S", 1.0)
    async with fault_proxy(redis_url) as proxy:
        gateway = await stand.gateway(redis_url=proxy.url)
        async with streaming(stand, gateway, {"x-headrace-disconnect": "30"}) as scene:
            await proxy.cut()
            said = await scene.rest()
            assert said[-1].json["code"] == "BROKER_UNAVAILABLE"
            cursor = said[-1].id
            refused = await gateway.client.post("/generate", json=BODY)
            assert refused.status_code == 503
            assert refused.json()["error_type"] == "overloaded"
            assert refused.headers["x-should-retry"] == "true"
            await proxy.heal()
            await scene.turn.say("b", finish="length")
            path = f"/v1/streams/{scene.stream_id}"

            async def is_back() -> bool:
                answer = await gateway.client.get(path, params={"after": cursor})
                return answer.status_code == 200 and '"generated_text":"ab"' in answer.text

            await wait_until(is_back, what="the rest of the stream")
            await _has_no_reader(stand, scene)


async def test_a_reader_that_left_while_redis_was_away_is_detached_later(
    stand: Stand, redis_url: str
) -> None:
    """Else the generation would run on for nobody: its gateway is alive."""
    async with fault_proxy(redis_url) as proxy:
        gateway = await stand.gateway(redis_url=proxy.url)
        async with streaming(stand, gateway, {"x-headrace-disconnect": "cancel"}) as scene:
            await proxy.cut()
        await wait_until(lambda: gateway.services.relay.num_streams == 0)
        await proxy.heal()
        await _has_ended(stand, scene.stream_id)


async def test_a_lost_answer_to_admit_is_not_the_clients_concern(
    stand: Stand, redis_url: str
) -> None:
    """Admission is tried again under the same id: the request runs once and is answered."""
    async with fault_proxy(redis_url) as proxy:
        gateway = await stand.gateway(redis_url=proxy.url)
        worker = await stand.worker()
        lost = proxy.lose_answer(b"_admit")
        asking = asyncio.create_task(gateway.client.post("/generate", json=BODY))
        await asyncio.wait_for(lost.hit.wait(), 5)
        turn = await worker.take()
        await turn.say("once", finish="length")
        answer = await asking
        assert answer.json()["generated_text"] == "once"
        state = await stand.broker.state()
        assert sum(state.waiting.values()) == 0


async def test_an_admission_that_was_given_up_is_cancelled(
    stand: Stand, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client was told 503, so whatever Redis made of the request must not run."""
    monkeypatch.setattr("gateway.admission.PATIENCE_S", 0.0)
    async with fault_proxy(redis_url) as proxy:
        gateway = await stand.gateway(redis_url=proxy.url)
        await stand.worker()
        proxy.lose_answer(b"_admit")
        refused = await gateway.client.post("/generate", json=BODY)
        assert refused.status_code == 503

        async def is_empty() -> bool:
            return sum((await stand.broker.state()).waiting.values()) == 0

        await wait_until(is_empty)


async def test_what_redis_forgot_is_queued_again(stand: Stand, raw: RawRedis) -> None:
    """Redis restarts without its last second: an admission is unknown, the gateway has it."""
    gateway = await stand.gateway()
    worker = await stand.worker()
    async with gateway.client.stream("POST", "/generate_stream", json=BODY) as response:
        stream_id = response.headers["x-headrace-stream-id"]
        await raw.flushall()
        await stand.broker.load()
        await worker.beat()
        turn = await worker.take()
        assert turn.id == f"{stream_id}.0"
        await turn.say("a", finish="length")
        events = [event async for event in read_events(response)]
    assert events[-1].json["generated_text"] == "a"


async def test_what_redis_forgot_is_queued_again_for_a_client_that_left(
    stand: Stand, raw: RawRedis
) -> None:
    """It may come back within its grace time; without it the generation is then cancelled."""
    gateway = await stand.gateway()
    worker = await stand.worker()
    headers = {"x-headrace-disconnect": "30"}
    async with gateway.client.stream(
        "POST", "/generate_stream", json=BODY, headers=headers
    ) as response:
        stream_id = response.headers["x-headrace-stream-id"]
    await wait_until(lambda: gateway.services.relay.num_streams == 0)
    await raw.flushall()
    await stand.broker.load()
    await worker.beat()
    turn = await worker.take()
    assert turn.id == f"{stream_id}.0"
    await turn.say("a", finish="length")
    resumed = await gateway.client.get(f"/v1/streams/{stream_id}")
    assert '"generated_text":"a"' in resumed.text


async def test_a_response_that_redis_forgot_comes_back_with_its_document(
    stand: Stand, raw: RawRedis
) -> None:
    """Its prompt is queued again, and what it says beside its tokens is there again, too."""
    gateway, worker = await stand.gateway(), await stand.worker()
    body = {"input": "Hello", "background": True, "instructions": "Be brief"}
    promised = (await gateway.client.post("/v1/responses", json=body)).json()
    await raw.flushall()
    await stand.broker.load()
    await worker.beat()
    turn = await worker.take()
    await turn.say("a", finish="eos_token")
    other = await stand.gateway()
    shown = (await other.client.get(f"/v1/responses/{promised['id']}")).json()
    assert (shown["status"], shown["instructions"]) == ("completed", "Be brief")


async def test_a_stranger_at_the_door_costs_the_reader_nothing(stand: Stand) -> None:
    """It has opened the stream and not been told yet that there is none for it."""
    gateway = await stand.gateway()
    async with streaming(stand, gateway) as scene:
        relay, read = gateway.services.relay, f"{scene.stream_id}.0"
        stranger = relay.open(read, "stranger")
        relay._readers[read].reverse()
        tail = stranger.tail
        await relay._attach_again(read)
        assert not relay._lost_since
        assert stranger.tail == tail, "nothing is put into its mailbox"
        relay.close(stranger)
        await scene.turn.say("b", finish="length")
        assert (await scene.rest())[-1].json["generated_text"] == "ab"


async def test_a_generation_that_redis_lost_for_good_is_said_to_be_gone(
    stand: Stand, raw: RawRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "LOST_LIMIT_S", 0.5)
    gateway = await stand.gateway()
    async with streaming(stand, gateway) as scene:
        gateway.services.relay._recent.forget(scene.stream_id)
        await raw.flushall()
        said = await scene.rest()
    assert said[-1].json["code"] == "STREAM_EXPIRED"


async def test_redis_may_restart_under_a_stream(
    stand: Stand, redis_server: RedisServer, raw: RawRedis
) -> None:
    """Everything was on disk, so this restart forgets nothing: the client sees a pause."""
    gateway = await stand.gateway()
    async with streaming(stand, gateway) as scene:
        await wait_until(lambda: _is_on_disk(raw), what="the append-only file")
        redis_server.kill()
        await asyncio.to_thread(redis_server.start)
        await scene.turn.say("b")
        assert await scene.next_text() == "b"
        await scene.turn.say("c", finish="length")
        assert (await scene.rest())[-1].json["generated_text"] == "abc"
    await wait_until(lambda: not gateway.services.relay._is_away)


async def test_a_gateway_that_leaves_starts_the_grace_time_of_its_streams(stand: Stand) -> None:
    gateway = await stand.gateway()
    async with streaming(stand, gateway, {"x-headrace-disconnect": "0.1"}) as scene:
        await gateway.services.relay.leave()

        async def has_ended() -> bool:
            await stand.broker.reap()
            page = await stand.broker.read(f"{scene.stream_id}.0", 0)
            return page is not None and page.state == "T"

        await wait_until(has_ended)


async def test_a_slow_client_costs_little_and_misses_nothing(stand: Stand) -> None:
    """It stops reading: its buffer stays bounded, others go on, and later it gets all of it."""
    gateway = await stand.gateway()
    worker = await stand.worker()
    texts = [f"{index:06d}" + "x" * 994 for index in range(6000)]
    reader, writer = await _post_slowly(gateway.url)
    long = await worker.take()
    async with gateway.client.stream("POST", "/generate_stream", json=BODY) as quick:
        short = await worker.take()
        for start in range(0, len(texts), 60):
            await long.say(*texts[start : start + 60])
        await long.say(finish="length")
        await short.say("quick", finish="length")
        assert "quick" in (await quick.aread()).decode()
    await wait_until(lambda: _only_stream(gateway).lags > 0, what="a bounded buffer to overflow")
    with capture_logs() as lines:
        raw = await asyncio.wait_for(reader.read(), 30)
        await wait_until(lambda: not gateway.services.relay.num_streams)
    writer.close()
    assert [line["lags"] > 0 for line in lines if line["event"] == "request.finished"] == [True]
    seen = re.findall(rb'"index":(\d+),"token":\{"id":\d+,"text":"(\d{6})x', raw)
    assert [(int(index), int(number)) for index, number in seen] == [
        (index + 1, index) for index in range(len(texts))
    ]


async def test_a_client_that_does_not_read_a_short_answer_is_seen_in_the_log(stand: Stand) -> None:
    """All of it fits into buffers, so nothing waits for that client; its connection knows."""
    gateway = await stand.gateway()
    worker = await stand.worker()
    reader, writer = await _post_slowly(gateway.url)
    long = await worker.take()
    with capture_logs() as lines:
        await long.say(*["x" * 1000 for _ in range(40)])
        await wait_until(lambda: _is_blocked(_only_stream(gateway)), what="a closed window")
        await long.say(finish="length")
        await wait_until(lambda: not gateway.services.relay.num_streams)
        async with gateway.client.stream("POST", "/generate_stream", json=BODY) as quick:
            await (await worker.take()).say(*["x" * 1000 for _ in range(40)], finish="length")
            await quick.aread()
        await wait_until(lambda: not gateway.services.relay.num_streams)
    assert (await asyncio.wait_for(reader.read(), 30)).count(b"x" * 1000) >= 40
    writer.close()
    slow, fast = (line for line in lines if line["event"] == "request.finished")
    assert 0 < slow["blocked_time"] <= slow["duration"]
    assert slow["unsent_bytes"] > 20_000
    assert "lags" not in slow
    assert fast.get("unsent_bytes", 0) == 0


# What the tests do behind the gateway's back ---------------------------------------------------


def _gen(scene: Scene) -> str:
    return f"{keys.prefix('simulated', 0)}gen:{scene.stream_id}.0"


async def _unsubscribe(raw: RawRedis, gateway: RunningGateway, scene: Scene) -> None:
    """As if Redis had never heard of this reader."""
    assert await raw.hget(_gen(scene), "subs") == gateway.name.encode()
    await raw.hset(_gen(scene), "subs", "")


async def _subscribe(raw: RawRedis, gateway: RunningGateway, scene: Scene) -> None:
    await raw.hset(_gen(scene), "subs", gateway.name)


async def _has_ended(stand: Stand, stream_id: str) -> None:
    async def has_ended() -> bool:
        page = await stand.broker.read(f"{stream_id}.0", 0)
        return page is not None and page.state == "T"

    await wait_until(has_ended, what="the end of the generation")


async def _has_no_reader(stand: Stand, scene: Scene) -> None:
    async def has_none() -> bool:
        look = await stand.broker.look(scene.gateway.name, [f"{scene.stream_id}.0"])
        return not look[0].subscribed

    await wait_until(has_none)


async def _is_on_disk(raw: RawRedis) -> bool:
    """Whether the append-only file was written, and synced to the disk, since now."""
    told = await raw.info("persistence")
    return not told["aof_pending_bio_fsync"] and not told["aof_buffer_length"]


async def _post_slowly(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client with a small window that has sent its request and does not read yet."""
    host, port = url.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    body = json.dumps(BODY).encode()
    writer.write(
        b"POST /generate_stream HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    )
    await writer.drain()
    return reader, writer


def _only_stream(gateway: RunningGateway) -> Stream:
    [stream] = gateway.services.relay._all_streams()
    return stream


def _is_blocked(stream: Stream) -> bool:
    outlet = stream._outlet
    assert isinstance(outlet, EventStream)
    if outlet._direct is None:
        return False
    outlet._direct.window.look()
    return outlet._direct.window.blocked_s > 0
