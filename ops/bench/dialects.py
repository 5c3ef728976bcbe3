"""The streaming APIs that the load client speaks: where they live, what they take and say."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

ApiName = Literal["completions", "chat", "tgi"]


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream. Counts are the server's own, None where this event says nothing.

    ``failure`` names the kind of an error event.
    """

    has_text: bool = False
    is_final: bool = False
    num_tokens: int | None = None
    num_prompt_tokens: int | None = None
    failure: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Dialect:
    """``make_body(model, prompt, new_tokens)``: a greedy, streaming request.

    ``run_on`` are fields to add for an answer of full length, behind the model's end token; which
    of them a server takes must be tried.
    """

    name: ApiName
    path: str
    make_body: Callable[[str, str, int], dict[str, object]]
    read_event: Callable[[Any], Event]
    run_on: tuple[dict[str, object], ...] = ()


_OPENAI_RUN_ON: tuple[dict[str, object], ...] = (
    {"ignore_eos": True},  # vLLM, SGLang, llama.cpp, Headrace
    {"generation_config": '{"do_sample": false, "eos_token_id": -1}'},  # `transformers serve`
)
"""Not OpenAI's own, who has no such field; and so has not Text Generation Inference."""


def _openai_body(model: str, new_tokens: int) -> dict[str, object]:
    return {
        "model": model,
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _chat_body(model: str, prompt: str, new_tokens: int) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, **_openai_body(model, new_tokens)}


def _completions_body(model: str, prompt: str, new_tokens: int) -> dict[str, object]:
    return {"prompt": prompt, **_openai_body(model, new_tokens)}


def _tgi_body(model: str, prompt: str, new_tokens: int) -> dict[str, object]:  # noqa: ARG001
    return {"inputs": prompt, "parameters": {"max_new_tokens": new_tokens, "details": True}}


def _read_openai(event: Any) -> Event:
    """A chunk. Servers differ in when usage comes: with the end, with each chunk, or never."""
    if event.get("error") or event.get("object") == "error":
        return _failed(event.get("error") or event)
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    text = choices[0].get("text") or delta.get("content") or delta.get("reasoning_content")
    usage = event.get("usage") or {}
    return Event(
        has_text=bool(text),
        is_final=bool(choices[0].get("finish_reason")),
        num_tokens=usage.get("completion_tokens"),
        num_prompt_tokens=usage.get("prompt_tokens"),
    )


def _read_tgi(event: Any) -> Event:
    if event.get("error"):
        return _failed(event)
    details = event.get("details") or {}
    token = event["token"]
    return Event(
        has_text=bool(token["text"]) and not token["special"],
        is_final=event.get("generated_text") is not None,
        num_tokens=details.get("generated_tokens"),
        num_prompt_tokens=details.get("input_length"),
    )


def _failed(error: Any) -> Event:
    if not isinstance(error, dict):
        return Event(is_final=True, failure="error", detail=str(error))
    kind = error.get("error_type") or error.get("code") or error.get("type") or "error"
    return Event(is_final=True, failure=str(kind), detail=str(error.get("message", error)))


DIALECTS: dict[ApiName, Dialect] = {
    "completions": Dialect(
        "completions", "/v1/completions", _completions_body, _read_openai, _OPENAI_RUN_ON
    ),
    "chat": Dialect("chat", "/v1/chat/completions", _chat_body, _read_openai, _OPENAI_RUN_ON),
    "tgi": Dialect("tgi", "/generate_stream", _tgi_body, _read_tgi),
}
"""In the order in which they are tried: a plain prompt first, which no chat template lengthens."""
