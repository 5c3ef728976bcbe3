"""What it takes to evaluate a generation again: prompt, parameters, seed; and what came out.

The log holds parameters that are numbers, the seed, and hashes of prompt and answer. The prompt is
in Redis while a choice of its request still runs, and for a day where workers died of it; later
only whoever sent it has it.
"""

import hmac
from contextlib import suppress
from typing import Any, cast

import click
import msgspec
import orjson

from common.broker import Broker
from common.failures import Failure
from common.ids import request_of
from common.keys import read_pepper
from common.messages import GenerationSpec, Sampling, unescape_pieces
from common.settings import BackgroundSettings
from gateway.admission import pack_tokens
from gateway.api import chat, completions, responses, tgi
from gateway.bodies import decoded
from gateway.lines import LineOffer, load_offer
from gateway.order import Order
from ops.incident.command import INCOMPLETE
from ops.incident.source import Logs
from ops.incident.tables import rows_of

_TENANT = "public"
_NUMBERS = frozenset(Sampling.__struct_fields__)


class CannotReplay(click.ClickException):
    """Something that it takes is not known any more."""

    exit_code = INCOMPLETE


class Logged(msgspec.Struct, frozen=True, kw_only=True):
    """What the log says of a generation. ``asked`` is the gateway's line, ``made`` the worker's."""

    job_id: str
    asked: dict[str, Any]
    made: dict[str, Any]

    @property
    def choice(self) -> int:
        return int(self.job_id.rpartition(".")[2])

    @property
    def prompt_number(self) -> int:
        """Which of several prompts of one request: they are queued as ``<request>-<number>``."""
        tail = request_of(self.job_id).removeprefix(str(self.asked["request_id"]))
        return int(tail[1:]) if tail[:1] == "-" and tail[1:].isdigit() else 0

    @property
    def ended_workers(self) -> bool:
        """Whether workers died of it."""
        return self.asked.get("code") == "POISON_REQUEST"

    @property
    def model_version(self) -> str:
        return str(self.made.get("model_version") or self.asked.get("model_version") or "")


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """``origin`` says in words where the prompt comes from, and how surely it is the one."""

    prompt: list[int]
    sampling: Sampling
    adapter: str
    origin: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody made of a recipe. ``tokens`` are ids, empty where only texts are known."""

    by: str
    tokens: list[int] = []
    pieces: list[str] = []
    """Text of each token; a held-back text stands with the token that released it."""
    finish_reason: str = ""
    model_version: str = ""
    worker: str = ""


def read_logged(logs: Logs, request: str, request_id: str) -> Logged:
    """What the loaded logs say of ``request``: the id of a request, or of one of its generations.

    Raises: CannotReplay where no gateway's line or no worker's end is there.
    """
    head, dot, choice = request.rpartition(".")
    wanted = request if dot and choice.isdigit() and head.startswith(request_id) else ""
    asked = rows_of(
        logs.db,
        """
        SELECT fields FROM events
        WHERE request_id = ? AND event IN ('request.finished', 'gateway.accepted')
        ORDER BY event DESC, seq
        """,
        [request_id],
    )
    made = rows_of(
        logs.db,
        """
        SELECT e.job_id, e.fields FROM events e JOIN job_lines l USING (seq)
        WHERE l.request_id = ? AND e.event IN ('worker.finished', 'worker.failed',
            'generation.cancelled') AND (? = '' OR e.job_id = ?)
        ORDER BY e.job_id, e.event <> 'worker.finished', e.seq DESC
        """,
        [request_id, wanted, wanted],
    )
    if not asked:
        raise CannotReplay(f"no gateway's line about {request} is in these logs; see --logs")
    job_id = str(made[0]["job_id"]) if made else wanted or f"{request_id}.0"
    return Logged(
        job_id=job_id,
        asked=orjson.loads(asked[0]["fields"]),
        made=orjson.loads(made[0]["fields"]) if made else {},
    )


async def find_recipe(
    logged: Logged, broker: Broker | None, settings: BackgroundSettings, given: bytes | None
) -> Recipe:
    """Prompt and parameters: from what is ``given``, else from Redis while it has them.

    Raises: CannotReplay; click.BadParameter where another prompt is given; Failure.
    """
    if given is not None:
        return await _from_file(logged, settings, given, broker)
    if broker is not None:
        spec = await broker.read_spec(request_of(logged.job_id))
        if spec is not None:
            return _from_spec(logged, spec, "Redis")
        spec = await broker.dead_letter_store.read_spec(logged.job_id)
        if spec is not None:
            return _from_spec(logged, spec, "its dead letter")
    raise CannotReplay(
        f"the prompt of {logged.job_id} is not in Redis, which drops it when the request ends: "
        "give it with --prompt-file (the request's JSON body, its text, or token ids)"
    )


def _from_spec(logged: Logged, spec: GenerationSpec, place: str) -> Recipe:
    prompt = [
        int.from_bytes(spec.prompt[i : i + 4], "little") for i in range(0, len(spec.prompt), 4)
    ]
    return Recipe(
        prompt=prompt,
        sampling=spec.sampling.of_choice(logged.choice),
        adapter=spec.adapter,
        origin=f"prompt and parameters from {place}",
    )


async def _from_file(
    logged: Logged, settings: BackgroundSettings, content: bytes, broker: Broker | None
) -> Recipe:
    body = _body_of(content)
    if isinstance(body, list):
        orders, prompts = list[Order](), [[int(token) for token in body]]
    else:
        offer = load_offer(settings)
        if isinstance(body, dict):
            orders = await _orders_of(offer, broker, content, body)
            prompts = [order.prompt for order in orders]
        else:
            text = _text_of(content)
            orders, prompts = list[Order](), [await offer.model.tokenizer.encode_async(text)]
    origin = _check(logged, settings, prompts)
    number = logged.prompt_number if logged.prompt_number < len(prompts) else 0
    sampling = _logged_sampling(logged, orders[number].sampling if orders else None)
    return Recipe(
        prompt=prompts[number],
        sampling=sampling.of_choice(logged.choice),
        adapter=str(logged.asked.get("adapter") or ""),
        origin=origin,
    )


def _body_of(content: bytes) -> dict[str, Any] | list[Any] | None:
    """A request's body, or token ids; None: it is text."""
    with suppress(orjson.JSONDecodeError):
        value = orjson.loads(content)
        if isinstance(value, dict):
            return cast("dict[str, Any]", value)
        if isinstance(value, list) and all(isinstance(token, int) for token in value):
            return cast("list[Any]", value)
    return None


def _text_of(content: bytes) -> str:
    """Without the newline that editors put at the end. Raises: click.BadParameter."""
    try:
        return content.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise click.BadParameter("--prompt-file: it is neither JSON nor text in UTF-8") from error


async def _orders_of(
    offer: LineOffer, broker: Broker | None, content: bytes, body: dict[str, Any]
) -> list[Order]:
    """The orders that a body stands for, by the field that holds its prompt."""
    if "messages" in body:
        return [await chat.order_of(offer, decoded(content, chat.decoder))]
    if "inputs" in body:
        return [await tgi.order_of(offer, decoded(content, tgi.decoder), stream=False)]
    if "prompt" in body:
        return await completions.orders_of(offer, decoded(content, completions.decoder))
    if "input" in body and broker is not None:
        asked = decoded(content, responses.decoder)
        return [await responses.order_of(offer, broker, _TENANT, asked)]
    raise click.BadParameter("--prompt-file: a JSON body needs messages, prompt, inputs or input")


def _check(logged: Logged, settings: BackgroundSettings, prompts: list[list[int]]) -> str:
    """In words how surely it is the prompt. Raises: click.BadParameter where it is another one."""
    num_tokens, wanted = sum(map(len, prompts)), logged.asked.get("prompt_tokens")
    if wanted is not None and num_tokens != wanted:
        raise click.BadParameter(
            f"--prompt-file: it has {num_tokens} tokens, the prompt of {logged.job_id} had {wanted}"
        )
    pepper = read_pepper(settings.key_pepper.get_secret_value(), settings.data_dir)
    told = logged.asked.get("prompt_sha256")
    if pepper is None or not told:
        return "prompt as given, of the right length (no pepper here to check its hash with)"
    packed = b"".join(map(pack_tokens, prompts))
    if hmac.digest(pepper, packed, "sha256").hex()[:16] != told:
        raise click.BadParameter(
            f"--prompt-file: it is not the prompt of {logged.job_id}: its hash is not the "
            "prompt_sha256 of the log"
        )
    return "prompt as given, the same by its hash"


def _logged_sampling(logged: Logged, given: Sampling | None) -> Sampling:
    """The parameters as they were: what a body says, else the log's numbers; always its seed.

    Raises: CannotReplay where neither has them.
    """
    asked = logged.asked
    unlogged = asked.get("unlogged") or (["grammar"] if asked.get("grammar") else [])
    seed = asked.get("seed")
    if seed is None and asked.get("sampling") == "sample":
        raise CannotReplay(f"the log does not tell the seed of {logged.job_id}")
    if given is not None:
        return msgspec.structs.replace(given, seed=int(seed or given.seed))
    if unlogged:
        raise CannotReplay(
            f"{', '.join(unlogged)} of {logged.job_id} cannot be in a log: give the request's JSON "
            "body as --prompt-file"
        )
    numbers = {
        name: value for name, value in (asked.get("parameters") or {}).items() if name in _NUMBERS
    }
    return msgspec.convert(
        numbers
        | {
            "max_new_tokens": asked.get("max_tokens") or 1,
            "seed": int(seed or 0),
            "do_sample": asked.get("sampling") == "sample",
            "temperature": asked.get("temperature") or 1.0,
        },
        Sampling,
        strict=False,
    )


async def read_answer(broker: Broker, job_id: str, by: str) -> Answer | None:
    """What Redis has of a generation so far; None: it does not know it (any more).

    Raises: Failure BROKER_UNAVAILABLE.
    """
    tokens: list[int] = []
    pieces: list[str] = []
    finish, version, worker = "", "", ""
    while True:
        page = await broker.read(job_id, len(tokens))
        if page is None:
            return None
        before = len(tokens)
        for entry in page.entries:
            record = entry.record
            if record.start == len(tokens):
                tokens += record.tokens
                pieces += [unescape_pieces([piece]) for piece in record.pieces]
            if record.finish is not None:
                finish = record.finish.code or record.finish.reason
            if entry.timing is not None:
                version, worker = entry.timing.model_version, entry.timing.worker
        if finish or len(tokens) == before:
            return Answer(
                by=by,
                tokens=tokens,
                pieces=pieces,
                finish_reason=finish,
                model_version=version,
                worker=worker,
            )


def as_failure(answer: Answer) -> Failure | None:
    """Where it ended in a failure instead of tokens."""
    with suppress(KeyError):
        return Failure(answer.finish_reason)
    return None
