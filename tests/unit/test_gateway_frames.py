"""Frames: the exact bytes of each API's stream, cut anywhere and continued without a difference."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from common.broker import Presentation
from common.failures import Failure
from common.messages import Finish, PromptLogprobs, Timing, TopTokens, escape_piece
from common.models.tokenizer import Tokenizer
from gateway.cursor import Cursor, chains_after, parse_cursor, parse_cursors
from gateway.frames import PING, Subject, frames_for, last_stage
from gateway.order import DETAILS, ECHO, FULL_TEXT, INCLUDE_USAGE, LOGPROBS, SHOW_TIER
from gateway.stream import Batch
from tests.support.models import simulated

TIMING = Timing(1_000, 1_250, 1_300, 3_250, 2, 1, "m@abc", "w1", "default")
HEADRACE = {
    "queue_time": 0.25,
    "time_to_first_token": 0.3,
    "generation_time": 2.0,
    "tokens_per_second": 1.5,
    "model_version": "m@abc",
    "attempts": 2,
    "finish_reason": "eos_token",
}
START_CHAIN = 0x1234
EOS = 258


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(simulated(tmp_path_factory.mktemp("data")).path)


def subject(
    api: str, flags: int = 0, num_choices: int = 1, prompt_characters: int = 0, **fields: Any
) -> Subject:
    shown = Presentation(api, flags, 1730000000, 9, 42, num_choices, prompt_characters)
    return Subject("r" * 32, "m", "m@abc", shown, **fields)


def batch(
    *texts: str,
    start: int = 0,
    tokens: list[int] | None = None,
    finish: Finish | None = None,
    choice: int = 0,
    tops: list[TopTokens] | None = None,
    prompt: PromptLogprobs | None = None,
) -> Batch:
    ids = tokens or [65 + start + index for index in range(len(texts))]
    before = chains_after(START_CHAIN, [65 + index for index in range(start)])
    return Batch(
        start=start,
        tokens=ids,
        pieces=[escape_piece(text) for text in texts],
        logprobs=[-0.5] * len(ids),
        chains=chains_after(before[-1] if before else START_CHAIN, ids),
        finish=finish,
        timing=TIMING if finish else None,
        choice=choice,
        tops=tops or [],
        prompt=prompt,
    )


def events(data: bytes) -> list[tuple[str, Any]]:
    """(id, payload) as the standard's parser dispatches them."""
    decoded = SSEDecoder().iter_bytes(iter([data]))
    return [
        (event.id or "", event.data if event.data == "[DONE]" else json.loads(event.data))
        for event in decoded
    ]


def test_a_chat_stream_to_the_byte(tokenizer: Tokenizer) -> None:
    frames = frames_for(subject("chat"), tokenizer)
    first = batch("Hé", "l\n")
    head = (
        b'{"id":"chatcmpl-' + b"r" * 32 + b'","object":"chat.completion.chunk",'
        b'"created":1730000000,"model":"m","system_fingerprint":"m@abc",'
        b'"choices":[{"index":0,"delta":{'
    )
    tail = b'"},"logprobs":null,"finish_reason":null}]}\n\n'
    assert frames.render(first) == (
        b"id: 1-%08x\ndata: " % first.chains[0]
        + head + b'"role":"assistant","content":"H\\u00e9' + tail
        + b"id: 2-%08x\ndata: " % first.chains[1]
        + head + b'"content":"l\\n' + tail
    )  # fmt: skip
    assert not frames.is_complete
    end = events(frames.render(batch("", start=2, tokens=[EOS], finish=Finish("eos_token"))))
    assert [cursor for cursor, _ in end] == [end[0][0], f"{end[0][0]}.1", f"{end[0][0]}.3"]
    assert end[0][1]["choices"][0]["delta"] == {"content": ""}
    assert end[1][1]["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert end[1][1]["headrace"] == HEADRACE
    assert end[2][1] == "[DONE]"
    assert frames.is_complete


def test_usage_is_null_until_its_own_chunk(tokenizer: Tokenizer) -> None:
    frames = frames_for(subject("chat", INCLUDE_USAGE), tokenizer)
    finish = Finish("length", cached_tokens=4)
    told = events(frames.render(batch("a", "b", finish=finish)))
    assert [payload["usage"] for _, payload in told[:3]] == [None] * 3
    assert told[2][1]["choices"][0]["finish_reason"] == "length"
    assert told[3][0].endswith(".2")
    assert told[3][1]["choices"] == []
    assert told[3][1]["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 2,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert told[4] == (told[3][0].replace(".2", ".3"), "[DONE]")


def test_an_empty_chat_answer_still_names_its_role(tokenizer: Tokenizer) -> None:
    frames = frames_for(subject("chat"), tokenizer)
    told = events(frames.render(batch(finish=Finish("cancelled"))))
    choice = told[0][1]["choices"][0]
    assert told[0][0] == "0-00000000.1"
    assert choice["delta"] == {"role": "assistant", "content": ""}
    assert choice["finish_reason"] == "stop"
    assert told[0][1]["headrace"]["finish_reason"] == "cancelled"


def test_the_tier_is_echoed_when_it_was_named(tokenizer: Tokenizer) -> None:
    frames = frames_for(subject("chat", SHOW_TIER, lane="flex"), tokenizer)
    assert events(frames.render(batch("a")))[0][1]["service_tier"] == "flex"


def test_a_completion_stream(tokenizer: Tokenizer) -> None:
    frames = frames_for(subject("completion"), tokenizer)
    told = events(frames.render(batch("a", "b", finish=Finish("stop_sequence"))))
    assert told[0][1] == {
        "id": "cmpl-" + "r" * 32,
        "object": "text_completion",
        "created": 1730000000,
        "model": "m",
        "system_fingerprint": "m@abc",
        "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}],
    }
    assert told[2][1]["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    ]
    assert told[3][1] == "[DONE]"


def test_a_native_stream_ends_with_the_last_token(tokenizer: Tokenizer) -> None:
    """One event per token, 1-based; text, details and timings with the last; no [DONE]."""
    frames = frames_for(subject("tgi", DETAILS), tokenizer)
    first = events(frames.render(batch("Héllo ", "wörld")))
    assert first[1][1] == {
        "index": 2,
        "token": {"id": 66, "text": "wörld", "logprob": -0.5, "special": False},
        "generated_text": None,
        "details": None,
    }
    last = events(frames.render(batch("", start=2, tokens=[EOS], finish=Finish("eos_token"))))
    assert len(last) == 1
    assert last[0][0].endswith(".1")
    assert last[0][1] == {
        "index": 3,
        "token": {"id": EOS, "text": "<|im_end|>", "logprob": -0.5, "special": True},
        "generated_text": "Héllo wörld",
        "details": {
            "finish_reason": "eos_token",
            "generated_tokens": 3,
            "seed": 42,
            "input_length": 9,
        },
        "headrace": HEADRACE,
    }


def test_native_details_come_only_when_asked_for(tokenizer: Tokenizer) -> None:
    frames = frames_for(subject("tgi", FULL_TEXT, prompt_text='Say "hi": '), tokenizer)
    told = events(frames.render(batch("hi", finish=Finish("length"))))
    assert told[0][1]["details"] is None
    assert told[0][1]["generated_text"] == 'Say "hi": hi'


def test_a_native_end_that_comes_alone_has_an_empty_special_token(tokenizer: Tokenizer) -> None:
    frames = frames_for(subject("tgi"), tokenizer)
    frames.render(batch("a", "b"))
    told = events(frames.render(batch(start=2, finish=Finish("cancelled"))))
    assert told[0][1]["index"] == 3
    assert told[0][1]["token"] == {"id": 0, "text": "", "logprob": 0.0, "special": True}
    assert told[0][1]["generated_text"] == "ab"


def test_a_logprob_that_json_cannot_say_is_null(tokenizer: Tokenizer) -> None:
    one = batch("a", "b")
    one.logprobs = [float("-inf"), None]
    told = events(frames_for(subject("tgi"), tokenizer).render(one))
    assert [payload["token"]["logprob"] for _, payload in told] == [None, None]


@pytest.mark.parametrize("api", ["tgi", "chat", "completion"])
def test_a_failed_generation_ends_with_an_error_event(tokenizer: Tokenizer, api: str) -> None:
    frames = frames_for(subject(api), tokenizer)
    finish = Finish("failed", "NAN_LOGITS", "row 3")
    told = events(frames.render(batch("a", finish=finish)))
    error = told[1][1]
    assert told[1][0].endswith(".1")
    assert error["error_type"] == "generation"
    if api == "tgi":
        assert error == {"error": "row 3", "error_type": "generation", "code": "NAN_LOGITS"}
        assert len(told) == 2
    else:
        assert error["error"]["code"] == "nan_logits"
        assert error["error"]["message"] == "row 3"
        assert told[2][1] == "[DONE]"
    assert frames.is_complete


@pytest.mark.parametrize("api", ["tgi", "chat"])
def test_a_failure_of_the_connection_keeps_the_last_cursor(tokenizer: Tokenizer, api: str) -> None:
    """So that a client resumes behind its last token, not behind the error."""
    frames = frames_for(subject(api), tokenizer)
    data = frames.render(batch("a")) + frames.failure(Failure("BROKER_UNAVAILABLE"))
    told = events(data)
    assert b"id:" not in frames.failure(Failure("DRAINING"))
    assert told[1][0] == told[0][0]
    assert (told[-1][1] == "[DONE]") == (api == "chat")


@given(api=st.sampled_from(["tgi", "chat", "completion"]), cut=st.integers(0, 5))
def test_a_stream_that_was_cut_goes_on_with_just_the_missing_frames(
    tokenizer: Tokenizer, api: str, cut: int
) -> None:
    """Also between the final frames, which have cursors of their own."""
    texts, finish = ["a", "b", "c"], Finish("length")
    flags = INCLUDE_USAGE | DETAILS
    whole = frames_for(subject(api, flags), tokenizer).render(batch(*texts, finish=finish))
    told = events(whole)
    seen = told[:cut]
    cursor = parse_cursor(seen[-1][0], "after") if seen else Cursor()
    rest = frames_for(
        subject(api, flags), tokenizer, [cursor], [[b"a", b"b", b"c"][: cursor.position]]
    ).render(batch(*texts[cursor.position :], start=cursor.position, finish=finish))
    assert seen + events(rest) == told
    is_whole = len(seen) == len(told)
    assert is_whole == (cursor.stage == last_stage(subject(api).presentation))


@pytest.mark.parametrize("api", ["tgi", "chat"])
def test_a_keep_alive_is_no_event_for_any_sdk(tokenizer: Tokenizer, api: str) -> None:
    """Between frames with ids: one newline, or the SDKs dispatch an empty event."""
    frames = frames_for(subject(api), tokenizer)
    data = PING + frames.render(batch("a")) + PING + PING + frames.render(batch("b", start=1))
    assert len(events(data)) == 2


def test_every_frame_is_ascii_on_one_line(tokenizer: Tokenizer) -> None:
    """httpx splits lines at U+2028 and U+0085, so no such character may be in a frame."""
    data = frames_for(subject("chat"), tokenizer).render(batch("a\u2028b\u0085c\x0bd\U0001f600"))
    assert data.isascii()
    assert len(data.decode().splitlines()) == 3
    assert events(data)[0][1]["choices"][0]["delta"]["content"] == "a\u2028b\u0085c\x0bd\U0001f600"


# Log-probabilities -------------------------------------------------------------------------------


def test_native_events_tell_the_likeliest_tokens(tokenizer: Tokenizer) -> None:
    tops: list[TopTokens] = [[(65, -0.5), (0xE2, -1.0), (EOS, float("-inf"))], [(66, -0.5)]]
    told = events(
        frames_for(subject("tgi"), tokenizer).render(
            batch("A", "B", tops=tops, finish=Finish("length"))
        )
    )
    assert list(told[0][1])[:3] == ["index", "token", "top_tokens"]
    assert told[0][1]["top_tokens"] == [
        {"id": 65, "text": "A", "logprob": -0.5, "special": False},
        {"id": 0xE2, "text": "\ufffd", "logprob": -1.0, "special": False},
        {"id": EOS, "text": "<|im_end|>", "logprob": None, "special": True},
    ]
    assert told[1][1]["top_tokens"] == [{"id": 66, "text": "B", "logprob": -0.5, "special": False}]
    assert told[1][1]["generated_text"] == "AB"


def test_a_chat_stream_with_logprobs(tokenizer: Tokenizer) -> None:
    """A token that is no text alone has its bytes; what is impossible has a number, too."""
    frames = frames_for(subject("chat", LOGPROBS), tokenizer)
    tops: list[TopTokens] = [[(65, -0.5), (66, float("-inf"))], [(0xC3, -0.1)]]
    told = events(frames.render(batch("A", "", tokens=[65, 0xC3], tops=tops)))
    assert told[0][1]["choices"][0]["delta"] == {"role": "assistant", "content": "A"}
    assert told[0][1]["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "A",
                "logprob": -0.5,
                "bytes": [65],
                "top_logprobs": [
                    {"token": "A", "logprob": -0.5, "bytes": [65]},
                    {"token": "B", "logprob": -9999.0, "bytes": [66]},
                ],
            }
        ],
        "refusal": None,
    }
    [entry] = told[1][1]["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("bytes:\\xc3", [0xC3])
    end = events(frames.render(batch(start=2, finish=Finish("length"))))
    assert end[0][1]["choices"][0]["logprobs"] is None


def test_a_chat_stream_with_logprobs_alone(tokenizer: Tokenizer) -> None:
    told = events(frames_for(subject("chat", LOGPROBS), tokenizer).render(batch("A")))
    [entry] = told[0][1]["choices"][0]["logprobs"]["content"]
    assert entry == {"token": "A", "logprob": -0.5, "bytes": [65], "top_logprobs": []}


def test_a_completion_stream_tells_where_each_token_begins(tokenizer: Tokenizer) -> None:
    """Held-back text counts where it comes; a resumed stream goes on counting."""
    one = subject("completion", LOGPROBS, prompt_characters=3)
    first = batch("Ä", "", "b🙂", tops=[[(67, -0.25)], [], []])
    told = [
        payload["choices"][0]["logprobs"]
        for _, payload in events(frames_for(one, tokenizer).render(first))
    ]
    assert [entry["text_offset"] for entry in told] == [[3], [4], [4]]
    assert told[0]["tokens"] == ["A"]
    assert told[0]["token_logprobs"] == [-0.5]
    assert told[0]["top_logprobs"] == [{"C": -0.25, "A": -0.5}], "the token itself is among them"
    cursor = Cursor(3, first.chains[-1])
    rest = frames_for(one, tokenizer, [cursor], [first.pieces]).render(batch("c", start=3))
    assert events(rest)[0][1]["choices"][0]["logprobs"]["text_offset"] == [6]


def test_a_prompt_is_repeated_in_a_chunk_without_a_cursor(tokenizer: Tokenizer) -> None:
    """No resumed stream could bring it again, so no cursor may stand behind it."""
    one = subject("completion", ECHO | LOGPROBS, prompt_text="é!", prompt=[0xC3, 0xA9, 33])
    scores = PromptLogprobs([None, -1.0, -2.0], [None, [(0xA9, -1.0)], [(34, -0.5)]])
    told = events(frames_for(one, tokenizer).render(batch("A", prompt=scores)))
    assert told[0][0] == ""
    choice = told[0][1]["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("é!", None)
    assert choice["logprobs"] == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9", "!"],
        "token_logprobs": [None, -1.0, -2.0],
        "top_logprobs": [None, {"bytes:\\xa9": -1.0}, {'"': -0.5, "!": -2.0}],
        "text_offset": [0, 0, 1],
    }
    assert told[1][1]["choices"][0]["text"] == "A"
    silent = subject("completion", ECHO, prompt_text="hi")
    echoed = events(frames_for(silent, tokenizer).render(batch("A")))[0][1]["choices"][0]
    assert (echoed["text"], echoed["logprobs"]) == ("hi", None)


# Several choices ---------------------------------------------------------------------------------


def interleaved() -> list[Batch]:
    """Two choices, as their tokens came."""
    return [
        batch("a"),
        batch("x", "y", choice=1),
        batch("b", start=1, finish=Finish("eos_token")),
        batch("z", start=2, choice=1),
        batch(start=3, choice=1, finish=Finish("length")),
    ]


@pytest.mark.parametrize("api", ["chat", "completion"])
def test_choices_are_interleaved_by_index(tokenizer: Tokenizer, api: str) -> None:
    frames = frames_for(subject(api, INCLUDE_USAGE, num_choices=2), tokenizer)
    told = [event for one in interleaved() for event in events(frames.render(one))]
    assert frames.is_complete
    assert told[0][0].endswith("~0-00000000")
    choices = [payload["choices"][0] for _, payload in told[:-2]]
    assert [choice["index"] for choice in choices] == [0, 1, 1, 0, 0, 1, 1]
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons == [None, None, None, None, "stop", None, "length"]
    assert told[-2][1]["usage"]["completion_tokens"] == 5
    assert told[-1][1] == "[DONE]"
    if api == "chat":
        opened = [choice["index"] for choice in choices if "role" in choice["delta"]]
        assert opened == [0, 1]


@given(
    api=st.sampled_from(["chat", "completion"]),
    flags=st.sampled_from([0, INCLUDE_USAGE, INCLUDE_USAGE | LOGPROBS]),
    cut=st.integers(1, 11),
)
def test_several_choices_go_on_with_just_the_missing_frames(
    tokenizer: Tokenizer, api: str, flags: int, cut: int
) -> None:
    """Each from its own place, whatever the others have shown."""
    one = subject(api, flags, num_choices=2)
    frames = frames_for(one, tokenizer)
    told = [event for part in interleaved() for event in events(frames.render(part))]
    seen = told[:cut]
    cursors = parse_cursors(seen[-1][0], "after")
    texts = [["a", "b"], ["x", "y", "z"]]
    pieces = [
        [text.encode() for text in of[: cursor.position]]
        for of, cursor in zip(texts, cursors, strict=True)
    ]
    again = frames_for(one, tokenizer, cursors, pieces)
    rest: list[Any] = []
    for choice, (of, cursor) in enumerate(zip(texts, cursors, strict=True)):
        finish = Finish("length" if choice else "eos_token")
        start = cursor.position
        rest += events(again.render(batch(*of[start:], start=start, choice=choice, finish=finish)))
    assert again.is_complete

    def shown(those: list[Any]) -> list[list[Any]]:
        """The payloads of each choice in their order, and those of all together."""
        found: list[list[Any]] = [[], [], []]
        for _, payload in those:
            of = payload["choices"] if isinstance(payload, dict) else []
            found[of[0]["index"] if of else 2].append(payload)
        return found

    assert shown(seen + rest) == shown(told)


def test_a_choice_that_fails_ends_the_stream_and_can_be_passed(tokenizer: Tokenizer) -> None:
    """Clients stop at an error; who resumes behind it gets what the others had to say."""
    one = subject("chat", num_choices=2)
    frames = frames_for(one, tokenizer)
    frames.render(batch("a"))
    told = events(frames.render(batch(choice=1, finish=Finish("failed", "NAN_LOGITS"))))
    assert told[0][1]["error"]["code"] == "nan_logits"
    assert told[1][1] == "[DONE]"
    assert frames.is_complete
    cursors = parse_cursors(told[0][0], "after")
    again = frames_for(one, tokenizer, cursors)
    assert again.render(batch(choice=1, finish=Finish("failed", "NAN_LOGITS"))) == b""
    rest = events(again.render(batch("b", start=1, finish=Finish("length"))))
    assert rest[0][1]["choices"][0]["delta"] == {"content": "b"}
    assert rest[-1][1] == "[DONE]"
    assert again.is_complete
