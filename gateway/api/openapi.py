"""The OpenAPI document of every route, made from the types that bodies are decoded into.

A route that is not in :data:`OPERATIONS` fails a test. What types cannot say, bounds and meanings,
stands in the tables below it; the words of ``/docs`` come from here as well.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from common.broker import MAX_CHOICES, Evidence, Requeued
from common.failures import KINDS, Failure
from common.files import MAX_LIFE_S, MIN_LIFE_S
from common.overview import Overview
from common.settings import GatewaySettings
from gateway import bodies
from gateway.api import batches, chat, completions, operations, platforms, responses, shapes, tgi
from gateway.api.completions import MAX_LOGPROBS
from gateway.errors import Wire, status_of, wire_of

Schema = dict[str, Any]

_REFERENCE = "#/components/schemas/"
_TEMPLATE = Path(__file__).with_name("docs.html")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path. ``answer`` and ``event`` are the JSON of a whole answer and of an
    event: a type, several of which it is one, or a media type that has no schema.
    """

    tag: str
    summary: str
    body: Any = None
    media_type: str = "application/json"
    """Of the body."""
    answer: Any = None
    event: Any = None
    generates: bool = False
    codes: tuple[str, ...] = ()
    """Failures beside those that its kind of route has."""
    more: tuple[int, ...] = ()
    """Statuses that need no schema."""
    not_ready: bool = False
    parameters: tuple[tuple[str, str, str], ...] = ()
    """Name, place and meaning of what is neither in the path nor in the body."""


_CURSOR = (
    ("Last-Event-ID", "header", "Where to go on: the `id` of the last event that was read."),
    ("after", "query", "The same, for clients that can send no header."),
)
_OF_A_GENERATION = (
    ("Idempotency-Key", "header", "The same request with the same key is answered once."),
    (
        "X-Headrace-Disconnect",
        "header",
        "What the client's leaving does: `cancel`, `continue`, or cancel after so many seconds.",
    ),
)
_OF_EVENTS = (
    ("X-Stream-Events", "header", "`1`: events of type `queue` tell the place while it waits."),
)

_OF_A_LOG = ("STREAM_EXPIRED", "STREAM_DIVERGED", "PROTOCOL_TOO_NEW", "DRAINING")

_OF_STORAGE = ("STORAGE_UNAVAILABLE", "STORAGE_FULL")

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/generate"): Operation(
        tag="Text Generation Inference",
        summary="Generate text; the answer comes in one piece.",
        body=tgi.GenerateBody,
        answer=shapes.GenerateAnswer,
        generates=True,
    ),
    ("POST", "/generate_stream"): Operation(
        tag="Text Generation Inference",
        summary="Generate text as a stream of tokens.",
        body=tgi.GenerateBody,
        event=shapes.StreamEvent,
        generates=True,
    ),
    ("POST", "/"): Operation(
        tag="Text Generation Inference",
        summary="As the inference API of the Hugging Face hub: a list of one answer, or a stream.",
        body=tgi.GenerateBody,
        answer=list[shapes.GenerateAnswer],
        event=shapes.StreamEvent,
        generates=True,
    ),
    ("POST", "/tokenize"): Operation(
        tag="Text Generation Inference",
        summary="The tokens of a text.",
        body=tgi.GenerateBody,
        answer=list[shapes.TextToken],
    ),
    ("POST", "/chat_tokenize"): Operation(
        tag="Text Generation Inference",
        summary="The prompt that a conversation becomes, as text and as tokens.",
        body=chat.ChatBody,
        answer=shapes.ChatTokens,
    ),
    ("GET", "/info"): Operation(
        tag="Text Generation Inference",
        summary="The model and the limits of this server.",
        answer=shapes.Info,
    ),
    ("POST", "/invocations"): Operation(
        tag="Hosting platforms",
        summary="Amazon SageMaker: the body of `/`, of chat completions or of completions.",
        body=(tgi.GenerateBody, chat.ChatBody, completions.CompletionBody),
        answer=(list[shapes.GenerateAnswer], shapes.ChatCompletion, shapes.TextCompletion),
        event=shapes.StreamEvent,
        generates=True,
    ),
    ("POST", "/vertex"): Operation(
        tag="Hosting platforms",
        summary="Google Vertex AI: several prompts, answered together.",
        body=platforms.VertexBody,
        answer=shapes.Predictions,
        generates=True,
    ),
    ("GET", "/ping"): Operation(
        tag="Hosting platforms",
        summary="Amazon SageMaker: 200 once requests would be worked on.",
        more=(200,),
        not_ready=True,
    ),
    ("GET", "/v2/health/live"): Operation(
        tag="Hosting platforms", summary="KServe: this gateway runs.", answer=shapes.KServeLive
    ),
    ("GET", "/v2/health/ready"): Operation(
        tag="Hosting platforms",
        summary="KServe: 200 once requests would be worked on.",
        answer=shapes.KServeReady,
        not_ready=True,
    ),
    ("POST", "/v1/chat/completions"): Operation(
        tag="OpenAI",
        summary="Answer a conversation, in one piece or as a stream.",
        body=chat.ChatBody,
        answer=shapes.ChatCompletion,
        event=shapes.ChatCompletionChunk,
        generates=True,
    ),
    ("POST", "/v1/completions"): Operation(
        tag="OpenAI",
        summary="Continue one prompt or several, in one piece or as a stream.",
        body=completions.CompletionBody,
        answer=shapes.TextCompletion,
        event=shapes.TextCompletionChunk,
        generates=True,
    ),
    ("POST", "/v1/responses"): Operation(
        tag="OpenAI",
        summary="Answer as a stored response, in one piece, as a stream, or in the background.",
        body=responses.ResponseBody,
        answer=shapes.ResponseObject,
        event=shapes.ResponseEvent,
        generates=True,
    ),
    ("POST", "/v1/responses/input_tokens"): Operation(
        tag="OpenAI",
        summary="How many tokens a response would read.",
        body=responses.ResponseBody,
        answer=shapes.InputTokens,
        codes=_OF_A_LOG,
    ),
    ("GET", "/v1/responses/{id}"): Operation(
        tag="OpenAI",
        summary="A response as it is now, or its events.",
        answer=shapes.ResponseObject,
        event=shapes.ResponseEvent,
        codes=("BAD_REQUEST", "NOT_FOUND", *_OF_A_LOG),
        parameters=(
            ("stream", "query", "`true`: its events, up to the last one."),
            ("starting_after", "query", "Only events with a greater `sequence_number`."),
        ),
    ),
    ("DELETE", "/v1/responses/{id}"): Operation(
        tag="OpenAI",
        summary="End a response and remove all that is kept of it.",
        answer=shapes.DeletedResponse,
        codes=("NOT_FOUND", *_OF_A_LOG),
    ),
    ("POST", "/v1/responses/{id}/cancel"): Operation(
        tag="OpenAI",
        summary="End a response in the background.",
        answer=shapes.ResponseObject,
        codes=("BAD_REQUEST", "NOT_FOUND", *_OF_A_LOG),
    ),
    ("GET", "/v1/responses/{id}/input_items"): Operation(
        tag="OpenAI",
        summary="All that was put in, page by page.",
        answer=shapes.InputItems,
        codes=("BAD_REQUEST", "NOT_FOUND", *_OF_A_LOG),
        parameters=(
            ("limit", "query", "Most items of a page."),
            ("order", "query", "`asc` or `desc`, which is the newest first."),
            ("after", "query", "The id of the last item of the page before."),
        ),
    ),
    ("POST", "/v1/files"): Operation(
        tag="Files",
        summary="Upload a file, for a batch.",
        body=shapes.FileForm,
        media_type="multipart/form-data",
        answer=shapes.File,
        codes=("DRAINING", "QUOTA_EXHAUSTED", *_OF_STORAGE),
    ),
    ("GET", "/v1/files"): Operation(
        tag="Files",
        summary="The files that are there, page by page.",
        answer=shapes.Files,
        codes=("BAD_REQUEST",),
        parameters=(
            ("purpose", "query", "Only files of this purpose."),
            ("limit", "query", "Most files of a page."),
            ("order", "query", "`asc` or `desc`, which is the newest first."),
            ("after", "query", "The id of the last file of the page before."),
        ),
    ),
    ("GET", "/v1/files/{id}"): Operation(
        tag="Files", summary="What is known of a file.", answer=shapes.File, codes=("NOT_FOUND",)
    ),
    ("GET", "/v1/files/{id}/content"): Operation(
        tag="Files",
        summary="The bytes of a file.",
        answer="application/octet-stream",
        codes=("NOT_FOUND", "STORAGE_UNAVAILABLE"),
        more=(206, 416),
        parameters=(("Range", "header", "One range of bytes."),),
    ),
    ("DELETE", "/v1/files/{id}"): Operation(
        tag="Files",
        summary="Remove a file.",
        answer=shapes.DeletedFile,
        codes=("NOT_FOUND", "STORAGE_UNAVAILABLE"),
    ),
    ("GET", "/v1/models"): Operation(
        tag="OpenAI", summary="The model that is served, and its adapters.", answer=shapes.Models
    ),
    ("GET", "/v1/models/{id}"): Operation(
        tag="OpenAI",
        summary="One of them.",
        answer=shapes.Model,
        codes=("MODEL_NOT_FOUND",),
    ),
    ("GET", "/v1/streams/{request_id}"): Operation(
        tag="Streams",
        summary="Any answer again, from any place in it, in the format that it was asked for.",
        event="text/event-stream",
        more=(204,),
        codes=("BAD_REQUEST", "NOT_FOUND", *_OF_A_LOG),
        parameters=(
            *_CURSOR,
            *_OF_EVENTS,
            ("events", "query", "The same, for clients that can send no header."),
            ("token", "query", "A token for this stream, instead of an API key."),
        ),
    ),
    ("POST", "/v1/streams/{request_id}/token"): Operation(
        tag="Streams",
        summary="A token to read this stream with, for clients that can send no header.",
        answer=shapes.StreamToken,
        codes=("NOT_FOUND",),
    ),
    ("DELETE", "/v1/streams/{request_id}"): Operation(
        tag="Streams",
        summary="Stop making an answer; what is there can still be read.",
        answer=shapes.CancelledStream,
        codes=("NOT_FOUND", *_OF_A_LOG),
    ),
    ("POST", "/v1/batches"): Operation(
        tag="Batches",
        summary="Answer every line of a file within a day, behind all who wait for an answer.",
        body=batches.BatchBody,
        answer=shapes.Batch,
        codes=("MODEL_NOT_ALLOWED", "IDEMPOTENCY_CONFLICT", "DRAINING"),
        parameters=(
            ("Idempotency-Key", "header", "The same batch with the same key is made once."),
        ),
    ),
    ("GET", "/v1/batches"): Operation(
        tag="Batches",
        summary="The batches that there are, the newest first, page by page.",
        answer=shapes.Batches,
        codes=("BAD_REQUEST",),
        parameters=(
            ("limit", "query", "Most batches of a page."),
            ("after", "query", "The id of the last batch of the page before."),
        ),
    ),
    ("GET", "/v1/batches/{id}"): Operation(
        tag="Batches", summary="How a batch stands.", answer=shapes.Batch, codes=("NOT_FOUND",)
    ),
    ("POST", "/v1/batches/{id}/cancel"): Operation(
        tag="Batches",
        summary="End a batch early; what is finished is kept.",
        answer=shapes.Batch,
        codes=("NOT_FOUND", "BATCH_ENDED"),
    ),
    ("GET", "/v1/batches/{id}/events"): Operation(
        tag="Batches",
        summary="A batch as it is worked off: counts, and lines as they finish, from any place.",
        event="text/event-stream",
        more=(204,),
        codes=("BAD_REQUEST", "NOT_FOUND", "STREAM_EXPIRED"),
        parameters=(
            ("Last-Event-ID", "header", "Only what is behind the event of this id."),
            ("starting_after", "query", "The same, for clients that can send no header."),
            ("lines", "query", "`0`: without the lines."),
            ("token", "query", "A token for this batch, instead of an API key."),
        ),
    ),
    ("POST", "/v1/batches/{id}/token"): Operation(
        tag="Batches",
        summary="A token to read these events with, for clients that can send no header.",
        answer=shapes.StreamToken,
        codes=("NOT_FOUND",),
    ),
    ("GET", "/health"): Operation(
        tag="Operation", summary="200 while this process lives.", more=(200,)
    ),
    ("GET", "/ready"): Operation(
        tag="Operation",
        summary="200 when a request sent now would be worked on.",
        answer=shapes.Ready,
        not_ready=True,
    ),
    ("GET", "/metrics"): Operation(
        tag="Operation", summary="Figures in Prometheus' text format.", answer="text/plain"
    ),
    ("GET", "/v1/stats"): Operation(
        tag="Operation",
        summary="queue_time, generation_time, tokens_per_second, error_rate and model_version of "
        "the whole pool: over the last minute, and over five minutes and an hour.",
        answer=operations.PoolStats,
    ),
    ("GET", "/ops/feed"): Operation(
        tag="Operation",
        summary="The whole pool, once a second: first `history`, fifteen minutes of figures by "
        "name, then `overview` events, from any place.",
        event=Overview,
        codes=("BAD_REQUEST", "DRAINING", "QUEUE_FULL"),
        parameters=(
            ("Last-Event-ID", "header", "Where to go on: the `id` of the last event."),
            ("from", "query", "The same, for clients that can send no header."),
        ),
    ),
    ("POST", "/ops/workers/{name}/drain"): Operation(
        tag="Operation",
        summary="Let a worker finish or hand over what it holds and rest, without ending it.",
        answer=operations.WorkerAction,
        codes=("NOT_FOUND",),
    ),
    ("POST", "/ops/workers/{name}/resume"): Operation(
        tag="Operation",
        summary="Let a worker that rests take work again.",
        answer=operations.WorkerAction,
        codes=("NOT_FOUND",),
    ),
    ("GET", "/ops/dead"): Operation(
        tag="Operation",
        summary="What was set aside because workers died of it, the newest first.",
        answer=operations.DeadLetters,
    ),
    ("GET", "/ops/dead/{id}"): Operation(
        tag="Operation",
        summary="How such a request was asked and how it went; never its text.",
        answer=Evidence,
        codes=("NOT_FOUND",),
    ),
    ("POST", "/ops/dead/{id}/requeue"): Operation(
        tag="Operation",
        summary="Ask it anew, once, as a new request; its tenant can read the answer under that.",
        answer=Requeued,
        codes=("NOT_FOUND", "STREAM_EXPIRED", "QUEUE_FULL", "NO_WORKERS",
               "CONTEXT_LENGTH_EXCEEDED", "BROKER_FULL"),
    ),
    ("POST", "/ops/dead/{id}/discard"): Operation(
        tag="Operation",
        summary="Remove it, prompt and all.",
        answer=operations.Discarded,
        codes=("NOT_FOUND",),
    ),
    ("GET", "/ops/streams"): Operation(
        tag="Operation",
        summary="Generations that run and wait: ids, ages, tokens, workers and lanes; no texts.",
        answer=operations.LiveStreams,
    ),
    ("GET", "/ops/errors/{code}"): Operation(
        tag="Operation",
        summary="The last requests that failed with a code, and the commands that show them.",
        answer=operations.LastFailures,
        codes=("NOT_FOUND",),
    ),
    ("GET", "/"): Operation(
        tag="Operation",
        summary="For a browser the way to the page, for everybody else as `/health`.",
        more=(200, 307),
    ),
    ("GET", "/ops/"): Operation(
        tag="Operation", summary="The live page of the pool.", answer="text/html"
    ),
    ("GET", "/docs"): Operation(tag="Operation", summary="This page.", answer="text/html"),
    ("GET", "/openapi.json"): Operation(
        tag="Operation", summary="This description, for programs.", answer=dict[str, Any]
    ),
    ("GET", "/api-doc/openapi.json"): Operation(
        tag="Operation", summary="The same, where TGI has it.", answer=dict[str, Any]
    ),
}  # fmt: skip

_MEANINGS = {
    "adapter_id": "Name of a LoRA adapter.",
    "best_of": "Make so many answers and choose the likeliest.",
    "content": "Text, or a list of parts of type `text`.",
    "decoder_input_details": "Tell the tokens of the prompt too.",
    "details": "Tell tokens, seed and finish reason.",
    "do_sample": "Draw tokens by chance; also whenever a warper is set.",
    "echo": "Begin the text with the prompt.",
    "file": "The file itself, with its name.",
    "frequency_penalty": "Lower the score of a token for each time it has occurred.",
    "grammar": "What the answer must match: an object of `type` json, json_schema, regex or ebnf, "
    "and `value`.",
    "guided_choice": "Texts, one of which the answer must be.",
    "guided_grammar": "EBNF that the answer must match.",
    "guided_json": "JSON schema that the answer must match.",
    "guided_regex": "Regular expression that the answer must match.",
    "ignore_eos": "Run on behind the end, to the full length.",
    "include_usage": "Send a chunk with the usage before the end.",
    "background": "Answer at once and work on; `store` keeps the response to be fetched.",
    "input": "A text, or the items of a conversation.",
    "inputs": "The prompt.",
    "instructions": "What the system says before the conversation.",
    "instances": "Bodies of `/generate` or of `/v1/chat/completions`.",
    "logit_bias": "Added to the scores of tokens, by token id.",
    "logprobs": "Tell log-probabilities; for completions a number, how many of the likeliest.",
    "max_completion_tokens": "As `max_tokens`; one of the two.",
    "max_new_tokens": "Most tokens to make, exactly; else all the room there is.",
    "max_output_tokens": "Most tokens to make; else all the room there is.",
    "max_tokens": "Most tokens to make; else all the room there is.",
    "messages": "The conversation. If the last one is the assistant's, it is continued.",
    "min_new_tokens": "No end before so many tokens.",
    "min_p": "Least probability of a token, relative to the likeliest one.",
    "min_tokens": "No end before so many tokens.",
    "model": "Any name means the model; an adapter's means that adapter.",
    "n": "Number of answers.",
    "parameters": "How to answer. Without it the answer is sampled, as in TGI.",
    "previous_response_id": "The response that this one follows on.",
    "presence_penalty": "Lower the score of a token that has occurred.",
    "prompt": "Text, token ids, or a list of such.",
    "repetition_penalty": "Divide the score of tokens that have occurred; 1 changes nothing.",
    "response_format": "What the answer must match, as OpenAI or TGI write it.",
    "return_full_text": "Begin the text with the prompt.",
    "role": "One of " + ", ".join(chat.ROLES) + ".",
    "seed": "The same seed, the same answer; else drawn.",
    "service_tier": "priority, default, flex or auto: how soon its turn comes.",
    "stop": "Texts at which to stop.",
    "stop_token_ids": "Tokens at which to stop.",
    "store": "Keep the response, to be fetched for some time.",
    "stream": "Send events as tokens are made.",
    "structured_outputs": "An object with one of `json`, `regex`, `grammar` and `choice`.",
    "suffix": "Not supported.",
    "temperature": "Flattens the distribution above 1, sharpens it below.",
    "top_k": "Keep the k likeliest tokens.",
    "top_logprobs": "How many of the likeliest to tell with each token.",
    "top_n_tokens": "How many of the likeliest to tell with each token.",
    "top_p": "Keep the likeliest tokens that have so much probability together.",
    "truncate": "Keep so many tokens of the prompt, the last ones.",
    "typical_p": "Keep tokens of typical information, so much probability together.",
    "watermark": "Mark the text, to be recognised as generated.",
}
_OF_ANY_BODY = ("BAD_REQUEST", "UNSUPPORTED_PARAMETER", "TEMPLATE_ERROR", "BODY_TOO_LARGE",
                "BODY_TIMEOUT", "UNSUPPORTED_MEDIA_TYPE")  # fmt: skip
_OF_ANY_ROUTE = ("INTERNAL", "ACCESS_MISCONFIGURED", "BROKER_UNAVAILABLE")
_STATUSES_OF_ANY_ROUTE = {401, 403, 431}
"""Who asks is checked before what is asked."""


def document(settings: GatewaySettings, version: str) -> Schema:
    """The whole document, with the limits that ``settings`` set."""
    types = _types(OPERATIONS.values())
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCE + "{name}")
    references = dict(zip(map(str, types), schemas, strict=True))
    _explain(components, _bounds(settings))
    paths: dict[str, Schema] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _described(method, path, operation, references)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Headrace",
            "version": version,
            "description": "Text generation over the APIs of Text Generation Inference and OpenAI.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _types(operations: Iterable[Operation]) -> list[Any]:
    """Every type of a body or an answer, once; a media type is none."""
    found: dict[str, Any] = {}
    for operation in operations:
        for shape in (operation.body, operation.answer, operation.event):
            found |= {str(arm): arm for arm in _arms(shape)}
    errors = (shapes.TgiError, shapes.OpenAiError, shapes.NotReady)
    return [*found.values(), *errors]


def _arms(shape: Any) -> tuple[Any, ...]:
    if shape is None or isinstance(shape, str):
        return ()
    return shape if isinstance(shape, tuple) else (shape,)


def _schema(shape: Any, references: dict[str, Schema]) -> Schema:
    if isinstance(shape, str):
        return {"type": "string"}
    schemas = [references[str(arm)] for arm in _arms(shape)]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _described(
    method: str, path: str, operation: Operation, references: dict[str, Schema]
) -> Schema:
    described: Schema = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": _operation_id(method, path),
        "parameters": _parameters(path, operation),
        "responses": _responses(path, operation, references),
    }
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": _content(operation.media_type, operation.body, references),
        }
    return described


def _operation_id(method: str, path: str) -> str:
    words = path.replace("{", "").replace("}", "").replace(".", "/").replace("-", "_").split("/")
    return "_".join([method.lower(), *filter(None, words)])


def _parameters(path: str, operation: Operation) -> list[Schema]:
    places = [(part[1:-1], "path", "") for part in path.split("/") if part.startswith("{")]
    common = _OF_A_GENERATION if operation.generates else ()
    if operation.generates and operation.event is not None:
        common += _OF_EVENTS
    return [
        {
            "name": name,
            "in": place,
            "required": place == "path",
            "schema": {"type": "string"},
            **({"description": meaning} if meaning else {}),
        }
        for name, place, meaning in (*places, *operation.parameters, *common)
    ]


def _responses(path: str, operation: Operation, references: dict[str, Schema]) -> Schema:
    content = {
        **_content("application/json", operation.answer, references),
        **_events(operation.event, references),
    }
    responses: Schema = {}
    if content:
        responses["200"] = {"description": "The answer.", "content": content}
    for status in operation.more:
        responses[str(status)] = {"description": _WITHOUT_BODY[status]}
    responses |= _refusals(wire_of(path), operation, references)
    if operation.not_ready:
        responses["503"] = {
            "description": "Nobody would work on a request now; the reason.",
            "content": _content("application/json", shapes.NotReady, references),
        }
    return dict(sorted(responses.items()))


_WITHOUT_BODY = {
    200: "Yes; the body is empty.",
    206: "The range that was asked for.",
    416: "The range lies behind the end.",
    204: "Nothing is missing: the stream was read to its end.",
    307: "To the page, for a browser.",
}


def _content(media_type: str, shape: Any, references: dict[str, Schema]) -> Schema:
    if shape is None:
        return {}
    media_type = shape if isinstance(shape, str) else media_type
    return {media_type: {"schema": _schema(shape, references)}}


def _events(shape: Any, references: dict[str, Schema]) -> Schema:
    """A stream by one of its events. ``[DONE]`` is the only data that is no JSON."""
    if shape is None:
        return {}
    data: Schema = {"type": "string"}
    if not isinstance(shape, str):
        content = _schema(shape, references)
        data |= {"contentMediaType": "application/json", "contentSchema": content}
    event = {
        "type": "object",
        "properties": {"id": {"type": "string"}, "data": data},
        "required": ["data"],
    }
    return {"text/event-stream": {"schema": event}}


def _refusals(wire: Wire, operation: Operation, references: dict[str, Schema]) -> Schema:
    """By status: every failure that it may stand for."""
    codes: dict[int, list[str]] = {}
    for code in _codes(operation):
        codes.setdefault(status_of(Failure(code), wire), []).append(code)
    if wire == "tgi" and operation.body is not None:
        codes.setdefault(400, []).append("BAD_REQUEST")  # what is no JSON at all
    error = shapes.TgiError if wire == "tgi" else shapes.OpenAiError
    return {
        str(status): {
            "description": " ".join(f"{code}: {KINDS[code].meaning}" for code in said),
            "content": _content("application/json", error, references),
        }
        for status, said in codes.items()
    }


def _codes(operation: Operation) -> list[str]:
    if operation.generates:
        return list(KINDS)
    of_body = _OF_ANY_BODY if operation.body is not None else ()
    return [
        code
        for code, kind in KINDS.items()
        if code in (*of_body, *operation.codes, *_OF_ANY_ROUTE)
        or kind.status in _STATUSES_OF_ANY_ROUTE
    ]


# What types cannot say ---------------------------------------------------------------------------


def _bounds(settings: GatewaySettings) -> dict[str, dict[str, Schema]]:
    """Bounds of numbers and lists, by the type and the field that they hold for."""
    penalty = _between(-bodies.MAX_PENALTY, bodies.MAX_PENALTY)
    tokens = _between(1, bodies.MAX_NEW_TOKENS)
    share = {"exclusiveMinimum": 0, "exclusiveMaximum": 1}
    openai = {
        "n": _between(1, MAX_CHOICES),
        "max_tokens": tokens,
        "min_tokens": _between(0, bodies.MAX_NEW_TOKENS),
        "temperature": _between(0, 2),
        "top_p": _between(0, 1),
        "top_k": _between(-1, bodies.MAX_TOP_K),
        "min_p": _between(0, 1),
        "typical_p": _above_0(1),
        "frequency_penalty": penalty,
        "presence_penalty": penalty,
        "repetition_penalty": _above_0(bodies.MAX_REPETITION_PENALTY),
        "seed": _between(-(2**63), bodies.MAX_SEED),
        "stop_token_ids": {"maxItems": bodies.MAX_STOP_TOKENS},
        "stop": {"maxItems": settings.max_stop_sequences},
    }
    return {
        "ChatBody": openai
        | {
            "max_completion_tokens": tokens,
            "top_logprobs": _between(0, chat.MAX_TOP_LOGPROBS),
            "messages": {"minItems": 1},
        },
        "CompletionBody": openai
        | {
            "max_tokens": _between(0, bodies.MAX_NEW_TOKENS),
            "best_of": _between(1, MAX_CHOICES),
            "logprobs": _between(0, MAX_LOGPROBS),
        },
        "ResponseBody": openai
        | {
            "max_output_tokens": tokens,
            "top_logprobs": _between(0, chat.MAX_TOP_LOGPROBS),
        },
        "Parameters": {
            "best_of": _between(0, settings.max_best_of),
            "temperature": _above_0(bodies.MAX_TEMPERATURE),
            "repetition_penalty": _above_0(bodies.MAX_REPETITION_PENALTY),
            "frequency_penalty": penalty,
            "presence_penalty": penalty,
            "top_k": _between(1, bodies.MAX_TOP_K),
            "top_p": share,
            "typical_p": share,
            "min_p": _between(0, 1),
            "max_new_tokens": tokens,
            "min_new_tokens": _between(0, bodies.MAX_NEW_TOKENS),
            "stop": {"maxItems": settings.max_stop_sequences},
            "stop_token_ids": {"maxItems": bodies.MAX_STOP_TOKENS},
            "truncate": _between(1, bodies.MAX_NEW_TOKENS),
            "seed": _between(0, bodies.MAX_SEED),
            "top_n_tokens": _between(0, settings.max_top_n_tokens),
        },
        "GenerateBody": {"inputs": {"minLength": 1}},
        "FileForm": {
            "file": {"format": "binary"},
            "expires_after[seconds]": _between(MIN_LIFE_S, MAX_LIFE_S),
        },
        "VertexBody": {
            "instances": {
                "minItems": 1,
                "maxItems": settings.max_client_batch_size,
                "items": {
                    "anyOf": [{"$ref": _REFERENCE + name} for name in ("GenerateBody", "ChatBody")]
                },
            }
        },
    }


def _between(low: float, high: float) -> Schema:
    return {"minimum": low, "maximum": high}


def _above_0(high: float) -> Schema:
    return {"exclusiveMinimum": 0, "maximum": high}


def _explain(components: dict[str, Schema], bounds: dict[str, dict[str, Schema]]) -> None:
    """Add meanings and bounds to the fields of requests."""
    for name, component in components.items():
        if "description" in component:
            component["description"] = component["description"].replace("``", "`")
        if name in vars(shapes):
            continue
        fields = component.get("properties", {})
        for field, schema in fields.items():
            extra = dict(bounds.get(name, {}).get(field, {}))
            if field in _MEANINGS:
                extra["description"] = _MEANINGS[field]
            # What stands beside a reference is ignored by many readers.
            fields[field] = ({"allOf": [schema]} if "$ref" in schema else schema) | extra


# The page ----------------------------------------------------------------------------------------


def page(described: Schema) -> str:
    """The document for people: one file, whose only resource is a style sheet of ours."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    tags: dict[str, list[Schema]] = {}
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            shown = operation | {"method": method.upper(), "path": path}
            tags.setdefault(operation["tags"][0], []).append(shown)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        kind_of=_kind, info=described["info"], tags=tags, schemas=described["components"]["schemas"]
    )


def _kind(schema: Schema) -> list[tuple[str, str]]:
    """A schema in words, as texts with the name of the type that each leads to."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(_REFERENCE)
        return [(name, name)]
    for word in ("anyOf", "allOf"):
        if word in schema:
            parts = [part for arm in schema[word] for part in (("", " or "), *_kind(arm))]
            return [(target, text) if target else ("", text) for target, text in parts[1:]]
    if "contentSchema" in schema.get("properties", {}).get("data", {}):
        return [("", "of "), *_kind(schema["properties"]["data"]["contentSchema"])]
    if "enum" in schema:
        return [("", " or ".join(str(value) for value in schema["enum"]))]
    if schema.get("type") == "array":
        return [("", "list of "), *_kind(schema.get("items", {}))]
    return [("", str(schema.get("type", "anything")))]


def routes_for(settings: GatewaySettings, version: str) -> list[Route]:
    """The routes of the document, which is made when it is first asked for."""

    @cache
    def as_json() -> bytes:
        return msgspec.json.encode(document(settings, version))

    @cache
    def as_page() -> str:
        return page(document(settings, version))

    async def show_json(_: Request) -> Response:
        return Response(as_json(), media_type="application/json")

    async def show_page(_: Request) -> Response:
        return Response(as_page(), media_type="text/html")

    return [
        Route("/openapi.json", show_json, methods=["GET"]),
        Route("/api-doc/openapi.json", show_json, methods=["GET"]),
        Route("/docs", show_page, methods=["GET"]),
    ]
