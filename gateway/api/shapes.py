"""The shapes of what this server answers, as the OpenAPI document tells them.

Answers are not built from these types: streams are made by joining bytes. Tests hold every answer
to its shape, so that the document stays true.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from common.batches import Status
from common.files import LIFE_S, UploadPurpose


class Timings(msgspec.Struct):
    """How it went, in seconds by one clock. All but ``finish_reason`` are there once it ended."""

    finish_reason: str
    queue_time: float | UnsetType = UNSET
    time_to_first_token: float | UnsetType | None = UNSET
    generation_time: float | UnsetType = UNSET
    tokens_per_second: float | UnsetType = UNSET
    model_version: str | UnsetType = UNSET
    attempts: int | UnsetType = UNSET


# TGI ---------------------------------------------------------------------------------------------

TgiReason = Literal["eos_token", "stop_sequence", "length", "cancelled"]


class GeneratedToken(msgspec.Struct):
    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillToken(msgspec.Struct):
    """The first token of a prompt has no log-probability."""

    id: int
    text: str
    logprob: float | None


class Sequence(msgspec.Struct):
    """``seed`` is null for a greedy answer; ``prefill`` is empty unless asked for."""

    finish_reason: TgiReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[GeneratedToken]


class BestOfSequence(Sequence):
    generated_text: str
    top_tokens: list[list[GeneratedToken]] | UnsetType = UNSET


class Details(Sequence):
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    top_tokens: list[list[GeneratedToken]] | UnsetType = UNSET


class GenerateAnswer(msgspec.Struct):
    generated_text: str
    headrace: Timings
    details: Details | UnsetType = UNSET


class StreamDetails(msgspec.Struct):
    finish_reason: TgiReason
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamEvent(msgspec.Struct):
    """One event of a native stream; text and details come with the last one."""

    index: int
    token: GeneratedToken
    generated_text: str | None
    details: StreamDetails | None
    top_tokens: list[GeneratedToken] | UnsetType = UNSET
    headrace: Timings | UnsetType = UNSET


class Predictions(msgspec.Struct):
    predictions: list[str]


class TextToken(msgspec.Struct):
    """``start`` and ``stop`` count bytes of UTF-8."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokens(msgspec.Struct):
    tokenize_response: list[TextToken]
    templated_text: str


class Info(msgspec.Struct):
    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    model_version: str
    model_dtype: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_top_n_tokens: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


class TgiError(msgspec.Struct):
    """``code`` is one of a closed list, and is never renamed."""

    error: str
    error_type: str
    code: str


# OpenAI ------------------------------------------------------------------------------------------

OpenAiReason = Literal["stop", "length", "tool_calls"]


class PromptDetails(msgspec.Struct):
    cached_tokens: int


class AnswerDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: AnswerDetails


class NamedToken(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(NamedToken):
    top_logprobs: list[NamedToken]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatToken]
    refusal: None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(msgspec.Struct):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: OpenAiReason
    headrace: Timings | UnsetType = UNSET


class _Answer(msgspec.Struct):
    id: str
    created: int
    model: str
    system_fingerprint: str | None


class ChatCompletion(_Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    headrace: Timings | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET


class CalledFunctionDelta(msgspec.Struct):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct):
    """Only the first one of an ``index`` has an id, a type and a name."""

    index: int
    function: CalledFunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(msgspec.Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: OpenAiReason | None


class ChatCompletionChunk(_Answer):
    """``usage`` is there where ``stream_options`` ask for it: null in all chunks but the last."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    headrace: Timings | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: OpenAiReason
    headrace: Timings | UnsetType = UNSET


class TextCompletion(_Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    headrace: Timings | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET


class CompletionChunkChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: OpenAiReason | None


class TextCompletionChunk(_Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    headrace: Timings | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET


class InputDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: AnswerDetails


class ResponseObject(msgspec.Struct):
    """Beside these it repeats the parameters of its request."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage | None
    completed_at: int | None
    headrace: Timings | UnsetType = UNSET


class ResponseEvent(msgspec.Struct):
    """``sequence_number`` counts from 0; what else an event holds depends on its type."""

    type: str
    sequence_number: int


class DeletedResponse(msgspec.Struct):
    id: str
    object: Literal["response"]
    deleted: bool


class InputTokens(msgspec.Struct):
    object: Literal["response.input_tokens"]
    input_tokens: int


class InputItems(msgspec.Struct):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileForm(msgspec.Struct):
    """The fields of an upload; ``file`` comes with its name."""

    file: str
    purpose: UploadPurpose
    anchor: Literal["created_at"] = msgspec.field(
        name="expires_after[anchor]", default="created_at"
    )
    seconds: int = msgspec.field(name="expires_after[seconds]", default=LIFE_S)


class File(msgspec.Struct):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class Files(msgspec.Struct):
    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchError(msgspec.Struct):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(msgspec.Struct):
    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(msgspec.Struct):
    total: int
    completed: int
    failed: int


class BatchUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: PromptDetails
    output_tokens: int
    output_tokens_details: AnswerDetails
    total_tokens: int


class Batch(msgspec.Struct):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class Batches(msgspec.Struct):
    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(msgspec.Struct):
    id: str
    object: Literal["file"]
    deleted: bool


class Model(msgspec.Struct):
    """An adapter is a model that has a ``parent``."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    model_version: str
    max_model_len: int
    adapter_version: str | UnsetType = UNSET
    parent: str | UnsetType = UNSET


class Models(msgspec.Struct):
    object: Literal["list"]
    data: list[Model]


class ErrorDetail(msgspec.Struct):
    """``param`` names the field that is wrong, where it is one."""

    message: str
    type: str
    param: str | None
    code: str
    http_status_code: int


class OpenAiError(msgspec.Struct):
    """``error_type`` is TGI's word for it."""

    error: ErrorDetail
    error_type: str


# Our own -----------------------------------------------------------------------------------------


class CancelledStream(msgspec.Struct):
    id: str
    object: Literal["stream"]
    state: str


class StreamToken(msgspec.Struct):
    id: str
    object: Literal["stream.token"]
    token: str
    expires_at: int
    url: str


class KServeLive(msgspec.Struct):
    live: bool


class KServeReady(msgspec.Struct):
    ready: bool


class Ready(msgspec.Struct):
    ready: bool
    workers: int
    model_version: str


class NotReady(msgspec.Struct):
    ready: bool
    reason: str
    error: str
    error_type: str
