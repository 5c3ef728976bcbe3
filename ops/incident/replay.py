"""`headrace incident replay REQUEST`: the same generation again, compared token by token.

A generation is a pure function of model version, prompt, parameters and seed. So it is asked for
once more, of the running pool or of given servers, and what comes is held against what came then:
the tokens where Redis still keeps them, else their hash in the log.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import httpx2
import msgspec
from rich.console import RenderableType
from rich.text import Text

from common.broker import Admission, Broker, Presentation, connect
from common.clock import monotonic_s, wall_ms
from common.failures import Failure
from common.ids import generation_id, new_request_id
from common.messages import GenerationSpec
from common.settings import BackgroundSettings
from gateway.admission import pack_tokens
from ops import runfile
from ops.incident.command import Confidence, Finding, Question, question_options, tell
from ops.incident.recipe import (
    Answer,
    CannotReplay,
    Logged,
    Recipe,
    as_failure,
    find_recipe,
    read_answer,
    read_logged,
)
from ops.incident.show import load_request
from ops.incident.source import Logs
from ops.options import build

_TENANT = "incident-replay"
"""Of its own: no other tenant's cached prefixes, and no limits of a key."""
_LOOK_S = 0.1
_KEPT_MS = 60_000
_AROUND = 8
"""Tokens on both sides of a difference whose text is shown, where that is asked for."""
_BY_ROUNDING = (
    "two replays differ from each other, too: with bfloat16 the rest of a batch may change a "
    "token; float32 does not"
)
_FOR_OPENAI = {"min_new_tokens": "min_tokens"}
_NOT_OPENAI = frozenset(
    {"relative_frequency_penalty", "watermark", "grammar", "keep_stop", "prompt_logprobs"}
)
"""Parameters that /v1/completions of other servers has no field for."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """``position`` is the first token that differs; None: none does. Token ids where both are
    known, else 0.
    """

    left: str
    right: str
    num_same: int
    position: int | None = None
    left_token: int = 0
    right_token: int = 0
    left_text: str = ""
    right_text: str = ""
    is_by_hash: bool = False
    """Only hashes were compared: they differ, nobody knows where."""


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """The whole result."""

    job_id: str
    model_version: str
    prompt_tokens: int
    origin: str
    answers: list[dict[str, Any]]
    comparisons: list[Comparison]


@click.command("replay")
@click.argument("request")
@click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The prompt, where Redis has dropped it: the request's JSON body, plain text, or a JSON "
    "list of token ids. Checked against the log.",
)
@click.option(
    "--against",
    metavar="URL[,URL]",
    help="Ask these servers (/v1/completions) instead of the pool, and compare them.",
)
@click.option("--key", envvar="OPENAI_API_KEY", help="API key for --against. [OPENAI_API_KEY]")
@click.option("--yes", is_flag=True, help="Run it on the pool even if workers have died of it.")
@click.option("--show-text", is_flag=True, help="Show the text around the first difference.")
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, help="Seconds to wait.")
@click.option("--redis-url", help="Redis of the pool; else that of the `headrace up` that runs.")
@click.option("--model", help="Name of the model and its pool; else as the log says.")
@question_options
def main(
    request: str,
    *,
    prompt_file: Path | None,
    against: str | None,
    key: str | None,
    yes: bool,
    show_text: bool,
    timeout_s: float,
    redis_url: str | None,
    model: str | None,
    question: Question,
) -> int:
    """Evaluate REQUEST again with the same seed and parameters, and compare the tokens.

    REQUEST is a request's id, or a generation's (`ID.1` for the second choice). Runs on the pool of
    the `headrace up` on DATA_DIR, or of --redis-url. Exits with 0 if all is the same, 1 at a
    difference, 2 where something that it takes is not known any more.
    """
    with Logs(question.sources) as logs:
        logged = read_logged(logs, request, load_request(logs, request))
        given = {"data_dir": question.data_dir, "redis_url": redis_url}
        settings = build(BackgroundSettings, given | {"model": model or logged.asked.get("model")})
        if logged.ended_workers and not (against or yes):
            raise CannotReplay(
                f"workers died of {logged.job_id}, and may do so again: name other servers with "
                "--against, or say --yes to run it on this pool"
            )
        urls = [url.strip() for url in (against or "").split(",") if url.strip()]
        prompt = prompt_file.read_bytes() if prompt_file else None
        replay, answers = asyncio.run(
            _replay(logged, settings, prompt, urls, key, timeout_s=timeout_s)
        )
        findings = find(question, logged, replay, answers)
        shown = show_replay(replay, with_text=show_text)
        if not show_text:
            replay = _without_text(replay)
        return tell(question, logs, findings, data={"replay": replay}, shown=shown)


async def _replay(
    logged: Logged,
    settings: BackgroundSettings,
    prompt: bytes | None,
    urls: Sequence[str],
    key: str | None,
    *,
    timeout_s: float,
) -> tuple[Replay, list[Answer]]:
    """Make the recipe, have it evaluated, and compare.

    Raises: CannotReplay, Failure, click.ClickException.
    """
    broker = Broker(connect(runfile.redis_url_of(settings)), settings.model)
    try:
        recipe = await _known_recipe(logged, broker, settings, prompt, is_local=not urls)
        original = await _original(broker, logged.job_id, is_local=not urls)
        if urls:
            answers = [await ask_server(url, key, recipe, timeout_s) for url in urls]
        else:
            answers = [await ask_pool(broker, recipe, timeout_s)]
            known = _compare(logged, original, answers)
            if not known or known[0].position is not None:
                # Once more: is it the answer of now, or another one each time?
                again = await ask_pool(broker, recipe, timeout_s)
                answers.append(msgspec.structs.replace(again, by="again"))
    finally:
        await broker.close()
    comparisons = _compare(logged, original, answers)
    if not comparisons:
        raise CannotReplay(
            "there is nothing to compare with: Redis does not keep the answer any more and the log "
            "has no hash of it; name two servers with --against"
        )
    known = [*([original] if original else []), *answers]
    return Replay(
        job_id=logged.job_id,
        model_version=logged.model_version,
        prompt_tokens=len(recipe.prompt),
        origin=recipe.origin,
        answers=[
            {
                "by": one.by,
                "tokens": len(one.tokens) or len(one.pieces),
                "finish_reason": one.finish_reason,
                "model_version": one.model_version,
                "worker": one.worker,
            }
            for one in known
        ],
        comparisons=comparisons,
    ), answers


async def _known_recipe(
    logged: Logged,
    broker: Broker,
    settings: BackgroundSettings,
    prompt: bytes | None,
    *,
    is_local: bool,
) -> Recipe:
    """With servers elsewhere and a file, no Redis is needed."""
    needs_redis = is_local or prompt is None
    return await find_recipe(logged, broker if needs_redis else None, settings, prompt)


async def _original(broker: Broker, job_id: str, *, is_local: bool) -> Answer | None:
    """What came then, while Redis keeps it."""
    try:
        answer = await read_answer(broker, job_id, "then")
    except Failure:
        if is_local:
            raise
        return None
    return answer if answer is not None and answer.tokens else None


# --- asking again --------------------------------------------------------------------------------


async def ask_pool(broker: Broker, recipe: Recipe, timeout_s: float) -> Answer:
    """Queue ``recipe`` for the workers of the pool and wait for its end.

    Raises: Failure, as a request would be refused or fail; CannotReplay when time runs out.
    """
    request_id = new_request_id()
    job_id = generation_id(request_id)
    limit_ms = int(timeout_s * 1000)
    await broker.admit(
        Admission(
            request_id=request_id,
            spec=GenerationSpec(
                prompt=pack_tokens(recipe.prompt),
                sampling=recipe.sampling,
                request_id=request_id,
                tenant=_TENANT,
                adapter=recipe.adapter,
            ),
            cost=len(recipe.prompt) + recipe.sampling.max_new_tokens,
            presentation=Presentation("completion", 0, wall_ms() // 1000, len(recipe.prompt)),
            gateway="",
            tenant=_TENANT,
            attached=False,
            grace_ms=0,
            queue_limit_ms=limit_ms,
            run_limit_ms=limit_ms,
            retention_ms=_KEPT_MS,
        )
    )
    deadline_s = monotonic_s() + timeout_s
    while monotonic_s() < deadline_s:
        answer = await read_answer(broker, job_id, "now")
        if answer is None:
            break
        if answer.finish_reason:
            failure = as_failure(answer)
            if failure is not None:
                raise failure
            return answer
        await asyncio.sleep(_LOOK_S)
    await broker.cancel(job_id, _TENANT)
    raise CannotReplay(f"it did not end within {timeout_s:g} s (--timeout)")


async def ask_server(url: str, key: str | None, recipe: Recipe, timeout_s: float) -> Answer:
    """Ask any server with /v1/completions for ``recipe``; its tokens are known by their texts.

    Raises: CannotReplay where it has no field for a parameter; click.ClickException.
    """
    root = url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        async with httpx2.AsyncClient(headers=headers, timeout=timeout_s) as client:
            models = await client.get(f"{root}/v1/models")
            models.raise_for_status()
            name = models.json()["data"][0]["id"]
            body = {"model": name, **_completion_body(recipe)}
            response = await client.post(f"{root}/v1/completions", json=body)
            if response.is_error:
                raise click.ClickException(f"{url}: {response.status_code}: {response.text[:300]}")
            (choice,) = response.json()["choices"]
    except (httpx2.HTTPError, KeyError, IndexError, ValueError, TypeError) as error:
        raise click.ClickException(f"{url}: {type(error).__name__}: {error}") from error
    told = list((choice.get("logprobs") or {}).get("tokens") or [])
    return Answer(
        by=url,
        # Tokens that are parts of a character have no text of their own.
        pieces=told if "".join(told) == choice["text"] else [choice["text"]],
        finish_reason=choice.get("finish_reason") or "",
        model_version=name,
    )


def _completion_body(recipe: Recipe) -> dict[str, Any]:
    sampling = recipe.sampling
    numbers: dict[str, Any] = msgspec.to_builtins(sampling)
    unknown = [name for name in numbers if name in _NOT_OPENAI]
    if unknown or recipe.adapter:
        raise CannotReplay(
            f"{', '.join(unknown) or 'an adapter'} cannot be asked for over /v1/completions: "
            "replay on the pool, without --against"
        )
    for name in ("max_new_tokens", "do_sample", "temperature", "top_logprobs"):
        numbers.pop(name, None)
    return {
        "prompt": recipe.prompt,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature if sampling.do_sample else 0.0,
        "logprobs": 0,
        **{_FOR_OPENAI.get(name, name): value for name, value in numbers.items()},
    }


# --- comparing -----------------------------------------------------------------------------------


def _compare(
    logged: Logged, original: Answer | None, answers: Sequence[Answer]
) -> list[Comparison]:
    """Each answer with what came then; without that, by its hash, or with one another."""
    if original is not None:
        return [compare(original, one) for one in answers]
    told = logged.made.get("output_sha256")
    if told and all(one.tokens for one in answers):
        return [_by_hash(str(told), one, logged) for one in answers]
    return [compare(answers[0], one) for one in answers[1:]]


def compare(left: Answer, right: Answer) -> Comparison:
    """Find the first token that differs: by ids where both have them, else by text.

    An answer that was cancelled or failed is compared as far as it went.
    """
    by_id = bool(left.tokens and right.tokens)
    ours: Sequence[int | str] = left.tokens if by_id else list("".join(left.pieces))
    theirs: Sequence[int | str] = right.tokens if by_id else list("".join(right.pieces))
    limit = len(ours) if _is_cut(left) else max(len(ours), len(theirs))
    same = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    if same >= limit:
        num_same = same if by_id else _token_at(_finer(left, right), same)
        return Comparison(left=left.by, right=right.by, num_same=num_same)
    if not by_id:
        same = _token_at(_finer(left, right), same)
    return Comparison(
        left=left.by,
        right=right.by,
        num_same=same,
        position=same,
        left_token=left.tokens[same] if by_id and same < len(left.tokens) else 0,
        right_token=right.tokens[same] if by_id and same < len(right.tokens) else 0,
        left_text=_text_around(left, same),
        right_text=_text_around(right, same),
    )


def _is_cut(answer: Answer) -> bool:
    return answer.finish_reason not in ("eos_token", "stop_sequence", "length", "stop")


def _finer(left: Answer, right: Answer) -> Answer:
    """The one whose tokens are known."""
    return left if len(left.pieces) >= len(right.pieces) else right


def _token_at(answer: Answer, character: int) -> int:
    """The token that this character of the answer's text belongs to."""
    end = 0
    for number, piece in enumerate(answer.pieces):
        end += len(piece)
        if end > character:
            return number
    return len(answer.pieces)


def _text_around(answer: Answer, position: int) -> str:
    return "".join(answer.pieces[max(0, position - _AROUND) : position + _AROUND])


def _by_hash(told: str, answer: Answer, logged: Logged) -> Comparison:
    packed = pack_tokens(answer.tokens)
    is_same = hashlib.sha256(packed).hexdigest()[:16] == told
    num_then = int(logged.made.get("end") or logged.made.get("completion_tokens") or 0)
    return Comparison(
        left="then",
        right=answer.by,
        num_same=len(answer.tokens) if is_same else 0,
        position=None if is_same else min(num_then, len(answer.tokens)),
        is_by_hash=True,
    )


# --- telling -------------------------------------------------------------------------------------


def find(
    question: Question, logged: Logged, replay: Replay, answers: Sequence[Answer]
) -> list[Finding]:
    """A finding for the first comparison that differs; equal tokens are none."""
    different = [one for one in replay.comparisons if one.position is not None]
    if not different:
        return []
    first = different[0]
    if first.is_by_hash:
        what = f"{first.right} is not what came then: its tokens have another hash"
    else:
        what = (
            f"{first.right} differs from {first.left} at token {first.position}: the "
            f"{first.num_same} before it are the same"
        )
    why, confidence = _why(logged, answers)
    versions = {one.model_version for one in answers if one.tokens} - {logged.model_version}
    command = "changes" if versions else f"show {logged.asked['request_id']}"
    return [Finding(what=what, confidence=confidence, why=why, next=question.next(command))]


def _why(logged: Logged, answers: Sequence[Answer]) -> tuple[str, Confidence]:
    """What a difference can come from, by what is known of both sides."""
    now = answers[0]
    if now.tokens and logged.model_version and now.model_version != logged.model_version:
        return f"model version {logged.model_version} then, {now.model_version} now", "certain"
    if len(answers) > 1 and all(one.tokens for one in answers):
        if answers[0].tokens != answers[1].tokens:
            return _BY_ROUNDING, "medium"
        return "two replays agree with each other, on the same model version", "high"
    return "", "certain"


def _without_text(replay: Replay) -> Replay:
    """Texts are a user's words: only who asks for them gets them."""
    bare = [msgspec.structs.replace(one, left_text="", right_text="") for one in replay.comparisons]
    return msgspec.structs.replace(replay, comparisons=bare)


def show_replay(replay: Replay, *, with_text: bool) -> list[RenderableType]:
    text = Text.assemble(
        ("\n" + replay.job_id, "bold"),
        f"  {replay.prompt_tokens} prompt tokens, model version {replay.model_version or '–'}\n",
        (f"{replay.origin}\n", "dim"),
    )
    for one in replay.answers:
        by = f"worker {one['worker']}" if one["worker"] else ""
        text.append(
            f"  {one['by']:<8} {one['tokens']} tokens, {one['finish_reason'] or 'no end'}  "
            f"{one['model_version']}  {by}\n"
        )
    for one in replay.comparisons:
        text.append(*_shown(one))
        if with_text and one.position is not None:
            text.append(f"    {one.left:<8} …{one.left_text!r}…\n")
            text.append(f"    {one.right:<8} …{one.right_text!r}…\n")
    return [text]


def _shown(one: Comparison) -> tuple[str, str]:
    """Words and their colour."""
    both = f"  {one.left} and {one.right}: "
    if one.position is None:
        known = "by their hash" if one.is_by_hash else "token by token"
        return f"{both}the same {one.num_same}, {known}\n", "green"
    if one.is_by_hash:
        return f"{both}not the same, by their hash\n", "red"
    tokens = f" is {one.left_token} and {one.right_token}" if one.left_token else ""
    return f"{both}token {one.position}{tokens}\n", "red"
