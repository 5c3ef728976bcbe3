"""Several answers to one request, and what is told with tokens: whole, streamed and resumed."""

import asyncio
from typing import Any

import httpx
import pytest

from common.messages import PromptLogprobs, seed_of_choice
from gateway.frames import usage
from ops.bench.sse_client import Event, read_events
from tests.support.gateway_app import RunningGateway, Stand
from tests.support.scripted_worker import ScriptedWorker, Turn, saying
from tests.support.sse_events import read_all
from tests.support.waiting import wait_until

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
STREAM: dict[str, Any] = CHAT | {"stream": True, "stream_options": {"include_usage": True}}


async def take(worker: ScriptedWorker, count: int) -> list[Turn]:
    """The turns of ``count`` choices of one request, in their order."""
    turns = [await worker.take() for _ in range(count)]
    return sorted(turns, key=lambda turn: turn.id)


async def post(gateway: RunningGateway, path: str, body: Any) -> "asyncio.Task[httpx.Response]":
    return asyncio.create_task(gateway.client.post(path, json=body))


def by_choice(events: list[Event]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for event in events:
        for choice in [] if event.is_done else event.json["choices"]:
            text = texts.get(choice["index"], "")
            texts[choice["index"]] = text + choice["delta"].get("content", "")
    return texts


# Whole answers -----------------------------------------------------------------------------------


async def test_choices_are_numbered_and_counted(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    asking = await post(gateway, "/v1/chat/completions", CHAT | {"n": 3})
    turns = await take(worker, 3)
    await turns[2].say("third", finish="length")
    await turns[0].say("first", "!", finish="eos_token")
    await turns[1].say("second", finish="stop_sequence")
    answer = await asking
    body = answer.json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    said = [choice["message"]["content"] for choice in body["choices"]]
    assert said == ["first!", "second", "third"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "stop", "length"]
    assert body["usage"]["completion_tokens"] == 4
    assert body["usage"]["prompt_tokens"] == int(answer.headers["x-prompt-tokens"])
    assert answer.headers["x-generated-tokens"] == "4"
    assert body["choices"][1]["headrace"]["finish_reason"] == "stop_sequence"


async def test_best_of_shows_the_likeliest_by_token_and_tells_the_others(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    parameters = {"best_of": 2, "do_sample": True, "details": True, "top_n_tokens": 1}
    asking = await post(gateway, "/generate", {"inputs": "hi", "parameters": parameters})
    turns = await take(worker, 2)
    long, short = [[(65, -0.5)]] * 3, [[(65, -1.0)]]
    await turns[0].say("no", logprobs=[-1.0], tops=short, finish="length")
    await turns[1].say("y", "e", "s", logprobs=[-0.5] * 3, tops=long, finish="length")
    body = (await asking).json()
    assert body["generated_text"] == "yes"
    details = body["details"]
    [other] = details["best_of_sequences"]
    assert details["generated_tokens"] == 3
    assert (
        details["top_tokens"] == [[{"id": 65, "text": "A", "logprob": -0.5, "special": False}]] * 3
    )
    assert details["seed"] == seed_of_choice(other["seed"], 1)
    assert other["generated_text"] == "no"
    assert {"finish_reason", "generated_tokens", "prefill", "tokens", "top_tokens"} <= other.keys()


async def test_openais_best_of_shows_only_the_best(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    asking = await post(gateway, "/v1/completions", {"prompt": "hi", "n": 1, "best_of": 3})
    for logprob, turn in zip((-3.0, -1.0, -2.0), await take(worker, 3), strict=True):
        await turn.say(f"{logprob}", logprobs=[logprob], finish="length")
    body = (await asking).json()
    assert [choice["text"] for choice in body["choices"]] == ["-1.0"]
    assert body["usage"]["completion_tokens"] == 3, "what was made is counted"


async def test_a_choice_that_fails_fails_the_call_and_ends_the_others(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    asking = await post(gateway, "/generate", {
        "inputs": "hi", "parameters": {"best_of": 2, "do_sample": True}
    })  # fmt: skip
    first, second = await take(worker, 2)
    await first.say("a")
    await second.fail("GRAMMAR_REJECTED", "it is endless")
    answer = await asking
    assert answer.status_code == 422
    assert answer.json()["error"] == "it is endless"

    async def is_gone() -> bool:
        return [refusal.kind for refusal in (await first.say("b")).refusals] == ["gone"]

    await wait_until(is_gone)


async def test_several_prompts_have_one_answer(stand: Stand) -> None:
    """Choices are numbered through the prompts; each prompt is a request with an id of its own."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = {"prompt": ["a", "bc"], "n": 2}
    async with worker.acting(lambda turn: turn.say(f"{len(turn.spec.prompt)}", finish="length")):
        answer = await gateway.client.post("/v1/completions", json=body)
    told = answer.json()
    assert [choice["text"] for choice in told["choices"]] == ["4", "4", "8", "8"]
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2, 3]
    assert told["usage"] == usage(3, 4, 0)
    assert len(answer.headers["x-headrace-stream-id"].split(", ")) == 2


async def test_prompts_are_admitted_all_or_none(stand: Stand) -> None:
    await stand.worker()
    gateway = await stand.gateway(lane_cap_tokens=100)
    body = {"prompt": ["a", "b"], "max_tokens": 60}
    headers = {"x-headrace-disconnect": "continue"}
    refused = await gateway.client.post("/v1/completions", json=body, headers=headers)
    assert refused.status_code == 429

    async def nothing_waits() -> bool:
        return not any((await stand.broker.state()).waiting.values())

    await wait_until(nothing_waits)
    assert gateway.services.relay.num_streams == 0


async def test_a_client_that_leaves_a_whole_answer_leaves_all_of_it(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    asking = await post(gateway, "/v1/chat/completions", CHAT | {"n": 2})
    turns = await take(worker, 2)
    asking.cancel()

    async def all_are_gone() -> bool:
        answers = [await turn.say("a") for turn in turns]
        return all(answer.refusals for answer in answers)

    await wait_until(all_are_gone)


# Streams -----------------------------------------------------------------------------------------


async def stream_of_two(stand: Stand) -> tuple[str, list[Event]]:
    """A stream whose choices ended at different times: its id and its events."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = STREAM | {"n": 2, "logprobs": True}
    async with gateway.client.stream("POST", "/v1/chat/completions", json=body) as response:
        first, second = await take(worker, 2)
        events = read_events(response)
        told = []
        for turn, text in ((second, "x"), (first, "a"), (second, "y")):
            await turn.say(text)
            told.append(await anext(events))
        await first.end()
        told += [await anext(events), await anext(events)]
        await second.say("z", finish="length")
        told += [event async for event in events]
        return response.headers["x-headrace-stream-id"], told


async def test_a_stream_interleaves_its_choices(stand: Stand) -> None:
    """As they come: nobody waits for another one's token."""
    _, events = await stream_of_two(stand)
    assert by_choice(events) == {0: "a", 1: "xyz"}
    reasons = {
        choice["index"]: choice["finish_reason"]
        for event in events[:-1]
        for choice in event.json["choices"]
        if choice["finish_reason"]
    }
    assert reasons == {0: "stop", 1: "length"}
    assert events[-2].json["usage"]["completion_tokens"] == 5
    assert events[-1].is_done
    assert events[0].json["choices"][0]["logprobs"]["content"][0]["logprob"] == -0.5


async def test_a_stream_of_choices_goes_on_at_any_event(stand: Stand) -> None:
    """On another gateway, every choice from its own place; 204 behind the end."""
    stream_id, events = await stream_of_two(stand)
    other = await stand.gateway()
    path = f"/v1/streams/{stream_id}"
    for seen in range(len(events)):
        asked = {"last-event-id": events[seen - 1].id} if seen else {}
        async with other.client.stream("GET", path, headers=asked) as resumed:
            assert resumed.status_code == 200
            rest = await read_all(resumed)
        assert by_choice(events[:seen] + rest) == by_choice(events)
        assert sorted(map(str, [e.data for e in events[seen:]])) == sorted(
            map(str, [e.data for e in rest])
        )
    done = await other.client.get(path, headers={"last-event-id": events[-1].id})
    assert done.status_code == 204


@pytest.mark.parametrize("cursor", ["1-0a1b2c3d", "0~0~0", "0~x", "~".join(["0"] * 99)])
async def test_a_cursor_has_a_part_for_each_choice(stand: Stand, cursor: str) -> None:
    stream_id, _ = await stream_of_two(stand)
    gateway = await stand.gateway()
    refused = await gateway.client.get(f"/v1/streams/{stream_id}", params={"after": cursor})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "after")
    assert gateway.services.relay.num_streams == 0


async def test_a_failed_choice_is_an_error_and_the_others_can_be_read_on(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = STREAM | {"n": 2}
    async with gateway.client.stream("POST", "/v1/chat/completions", json=body) as response:
        stream_id = response.headers["x-headrace-stream-id"]
        first, second = await take(worker, 2)
        await first.say("a")
        await second.fail("NAN_LOGITS")
        events = await read_all(response)
    assert events[-2].json["error"]["code"] == "nan_logits"
    path = f"/v1/streams/{stream_id}"
    asked = {"last-event-id": events[-2].id}
    async with gateway.client.stream("GET", path, headers=asked) as resumed:
        await first.say("b", finish="length")
        rest = await read_all(resumed)
    assert by_choice(rest) == {0: "b"}
    assert rest[-1].is_done


async def test_delete_ends_all_choices(stand: Stand) -> None:
    worker = await stand.worker()
    first, second = await stand.gateway(), await stand.gateway()
    body = STREAM | {"n": 3}
    async with first.client.stream("POST", "/v1/chat/completions", json=body) as response:
        stream_id = response.headers["x-headrace-stream-id"]
        turn = await worker.take()
        cancelled = await second.client.delete(f"/v1/streams/{stream_id}")
        assert cancelled.json()["state"] == "cancelled"
        events = await read_all(response)
    reasons = [event.json["headrace"]["finish_reason"] for event in events[:-2]]
    assert reasons == ["cancelled"] * 3
    assert (await turn.say("a")).refusals
    again = await second.client.delete(f"/v1/streams/{stream_id}")
    assert again.json()["state"] == "ended"


async def test_a_client_that_leaves_a_stream_leaves_all_its_choices(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    headers = {"x-headrace-disconnect": "cancel"}
    async with gateway.client.stream(
        "POST", "/v1/chat/completions", json=STREAM | {"n": 2}, headers=headers
    ) as response:
        turns = await take(worker, 2)
        await turns[0].say("a")
        await anext(read_events(response))

    async def all_are_gone() -> bool:
        answers = [await turn.say("b") for turn in turns]
        return all(answer.refusals for answer in answers)

    await wait_until(all_are_gone)
    await wait_until(lambda: gateway.services.relay.num_streams == 0)


async def test_choices_that_redis_forgot_are_queued_again(stand: Stand) -> None:
    """All of them, though each has a stream of its own."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    asking = await post(gateway, "/v1/chat/completions", CHAT | {"n": 2})
    await wait_until(lambda: gateway.services.relay.num_streams == 2)

    async def both_wait() -> bool:
        return sum((await stand.broker.state()).waiting.values()) == 2

    await wait_until(both_wait)
    await stand.broker._redis.execute_command("FLUSHDB")
    await worker.beat()
    async with worker.acting(saying("a", finish="length")):
        body = (await asking).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["a", "a"]


# What is told with tokens ------------------------------------------------------------------------


async def test_the_prompts_tokens_stand_in_the_details(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    parameters = {"decoder_input_details": True}
    asking = await post(gateway, "/generate", {"inputs": "hi", "parameters": parameters})
    turn = await worker.take()
    assert turn.spec.sampling.prompt_logprobs
    await turn.say("a", prompt=PromptLogprobs([None, -1.5]), finish="length")
    details = (await asking).json()["details"]
    assert details["prefill"] == [
        {"id": 104, "text": "h", "logprob": None},
        {"id": 105, "text": "i", "logprob": -1.5},
    ]
    assert "top_tokens" not in details


async def test_an_echo_of_the_prompt_alone(stand: Stand) -> None:
    """As evaluation harnesses ask: nothing is made, and all is told of the prompt."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = {"prompt": [104, 105], "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    asking = await post(gateway, "/v1/completions", body)
    turn = await worker.take()
    assert turn.spec.sampling.max_new_tokens == 0
    scores = PromptLogprobs([None, -1.5], [None, [(106, -0.25)]])
    await turn.say(prompt=scores, finish="length")
    answer = (await asking).json()
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
    assert choice["logprobs"] == {
        "tokens": ["h", "i"],
        "token_logprobs": [None, -1.5],
        "top_logprobs": [None, {"j": -0.25, "i": -1.5}],
        "text_offset": [0, 1],
    }
    assert answer["usage"] == usage(2, 0, 0)


async def test_an_echo_with_an_answer(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = {"prompt": "hi", "max_tokens": 1, "echo": True, "logprobs": 1}
    asking = await post(gateway, "/v1/completions", body)
    turn = await worker.take()
    scores = PromptLogprobs([None, -1.5], [None, [(105, -1.5)]])
    await turn.say("!", prompt=scores, tops=[[(65, -0.5)]], finish="length")
    [choice] = (await asking).json()["choices"]
    assert choice["text"] == "hi!"
    assert choice["logprobs"]["token_logprobs"] == [None, -1.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert choice["logprobs"]["top_logprobs"][1:] == [{"i": -1.5}, {"A": -0.5}]


async def test_a_rejected_grammar_is_the_callers_error(stand: Stand) -> None:
    """Where nothing was sent yet it has a status code of its own."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = CHAT | {"response_format": {"type": "regex", "value": "("}}
    async with worker.acting(lambda turn: turn.fail("GRAMMAR_REJECTED", "unclosed group")):
        refused = await gateway.client.post("/v1/chat/completions", json=body)
        async with gateway.client.stream(
            "POST", "/v1/chat/completions", json=body | {"stream": True}
        ) as response:
            events = await read_all(response)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "grammar_rejected")
    assert events[0].json["error"]["message"] == "unclosed group"
