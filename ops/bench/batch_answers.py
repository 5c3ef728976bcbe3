"""Whether a batch answers as the same questions do one by one.

A batch of good and bad lines goes through OpenAI's own client, on a model in float32, greedy; then
every line is asked by itself. Bodies must be equal but for what names a request or times it; of
log-probabilities the last digits may differ, because a product of many rows adds in another order.
"""

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import openai
import orjson
import uvloop

from common.batches import FINAL
from common.models.store import DEFAULT_MODEL
from ops.bench.instance import own_instance

_ENDPOINT = "/v1/chat/completions"
_NAMES_OR_TIMES = frozenset({"id", "created", "headrace", "prompt_tokens_details", "timings"})
_LOGPROB_TOLERANCE = 1e-3
"""In natural logarithms: float32 sums of a few hundred terms differ by less."""
_AT_ONCE = 4
_LOOK_S = 0.5
_TOPICS = ("a river", "the sea", "a mill", "rain", "an old bridge", "the harbour", "a well")
_CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
}

Body = dict[str, Any]


@dataclass
class Report:
    """What came of a batch. ``expected_errors`` counts the lines that were made to be refused."""

    num_lines: int
    expected_errors: int
    batch: Body = field(default_factory=dict[str, Any])
    num_equal: int = 0
    largest_logprob_difference: float = 0.0
    problems: list[str] = field(default_factory=list[str])

    @property
    def has_passed(self) -> bool:
        return self.num_equal == self.num_lines and not self.problems

    def lines(self) -> list[str]:
        counts = self.batch["request_counts"]
        return [
            f"{self.batch['status']}: of {counts['total']} lines {counts['completed']} answered,",
            f"{counts['failed']} refused ({self.expected_errors} were made to be)",
            f"equal to the same question asked alone: {self.num_equal} of {self.num_lines}",
            f"largest difference of a log-probability: {self.largest_logprob_difference:.2g}",
            *self.problems[:20],
        ]


def bodies(num_lines: int, model: str) -> Iterator[Body]:
    """Good ones of every kind, and every seventh a bad one."""
    for number in range(num_lines):
        topic = _TOPICS[number % len(_TOPICS)]
        body: Body = {
            "model": model,
            "messages": [{"role": "user", "content": f"{number}: say something of {topic}."}],
            "max_tokens": 8 + number % 25,
            "temperature": 0,
        }
        yield body | (_bad(number // 7) if number % 7 == 6 else _good(number % 7))


def _good(kind: int) -> Body:
    return (
        {},
        {"stop": ["\n", "."]},
        {"logprobs": True, "top_logprobs": 2},
        {"frequency_penalty": 0.5, "presence_penalty": 0.2},
        {"logit_bias": {"28": -100}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": _CITY}}},
    )[kind]


def _bad(kind: int) -> Body:
    return (
        {"max_tokens": 0},
        {"messages": []},
        {"temperature": -1},
        {"messages": [{"role": "user", "content": "far too long " * 9000}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": 7}}},
        {"top_logprobs": 2},
    )[kind % 6]


async def run(client: openai.AsyncOpenAI, num_lines: int, model: str) -> Report:
    """Hand over the batch, wait, and ask each line by itself. ``model`` may be an adapter."""
    asked = dict(enumerate(bodies(num_lines, model)))
    report = Report(num_lines, sum(1 for number in asked if number % 7 == 6))
    answers = await _batch_answers(client, asked, report)
    places = asyncio.Semaphore(_AT_ONCE)

    async def compare(number: int) -> None:
        async with places:
            _note(report, number, answers.get(number), await _asked_alone(client, asked[number]))

    async with asyncio.TaskGroup() as group:
        for number in asked:
            group.create_task(compare(number))
    return report


async def _batch_answers(
    client: openai.AsyncOpenAI, asked: dict[int, Body], report: Report
) -> dict[int, tuple[int, Body]]:
    """Status and body of each line, by its number."""
    rows = (
        {"custom_id": str(number), "method": "POST", "url": _ENDPOINT, "body": body}
        for number, body in asked.items()
    )
    content = b"\n".join(map(orjson.dumps, rows))
    file = await client.files.create(file=("lines.jsonl", content), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint=_ENDPOINT, completion_window="24h"
    )
    while batch.status not in FINAL:
        await asyncio.sleep(_LOOK_S)
        batch = await client.batches.retrieve(batch.id)
    report.batch = batch.model_dump()
    told: dict[int, tuple[int, Body]] = {}
    for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
        for line in (await client.files.content(file_id)).text.splitlines():
            row = orjson.loads(line)
            number = int(row["custom_id"])
            if number in told:
                report.problems.append(f"line {number} stands there twice")
            told[number] = (row["response"]["status_code"], row["response"]["body"])
    return told


async def _asked_alone(client: openai.AsyncOpenAI, body: Body) -> tuple[int, Body]:
    try:
        answer = await client.chat.completions.with_raw_response.create(**body)
    except openai.APIStatusError as refusal:
        return refusal.status_code, orjson.loads(refusal.response.content)
    return answer.status_code, orjson.loads(answer.content)


def _note(
    report: Report, number: int, batched: tuple[int, Body] | None, alone: tuple[int, Body]
) -> None:
    if batched is None:
        report.problems.append(f"line {number} is in neither file")
        return
    difference = _difference(report, batched[1], alone[1])
    if batched[0] != alone[0]:
        difference = f"status {batched[0]} against {alone[0]}"
    if difference:
        report.problems.append(f"line {number}: {difference}")
    else:
        report.num_equal += 1


def _difference(report: Report, one: Any, other: Any, at: str = "") -> str:
    """Where the two differ; empty when they do not."""
    if isinstance(one, dict) and isinstance(other, dict):
        names: set[str] = {*one, *other} - _NAMES_OR_TIMES
        pairs = [(f"{at}.{name}", one.get(name), other.get(name)) for name in sorted(names)]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{at}[{i}]", *pair) for i, pair in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, float) and isinstance(other, float) and at.endswith(".logprob"):
        apart = abs(one - other)
        report.largest_logprob_difference = max(report.largest_logprob_difference, apart)
        return f"{at}: {one} against {other}" if apart > _LOGPROB_TOLERANCE else ""
    else:
        return "" if one == other else f"{at}: {one!r} against {other!r}"
    return next(filter(None, (_difference(report, a, b, where) for where, a, b in pairs)), "")


@click.command()
@click.option("--lines", "num_lines", default=1000, show_default=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("var"), show_default=True)
def main(num_lines: int, model: str, data_dir: Path) -> None:
    """Ask every line of a batch once more by itself, through OpenAI's client, and compare.

    Exits with 1 when an answer differs or a line is missing.
    """
    options = ("--model", model, "--dtype", "float32")

    async def measured(url: str) -> Report:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0
        ) as client:
            return await run(client, num_lines, model)

    with own_instance(*options, models=data_dir / "models") as (_, urls):
        report = uvloop.run(measured(urls[0]))
    click.echo("\n".join(report.lines()))
    sys.exit(0 if report.has_passed else 1)
