"""The small language in which `--bad` says which requests are bad, made into SQL with parameters.

``code = "CUDA_OOM"``, ``ttft > 2.5 and lane = interactive``, ``not (worker in (w1, w2))``,
``user_agent ~ curl`` (contains). Fields are the columns of the table ``requests`` and nothing else;
values never become part of the SQL.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import click

NUMBERS = frozenset(
    {
        "arrived",
        "attempts",
        "batch_size",
        "deaths",
        "duration",
        "ended",
        "generation_time",
        "max_tokens",
        "n",
        "prompt_tokens",
        "queue_time",
        "status",
        "tokens",
        "tokens_per_second",
        "ttft",
    }
)
WORDS = frozenset(
    {
        "adapter",
        "api",
        "code",
        "flagged",
        "gateway",
        "git_sha",
        "gpu",
        "grammar",
        "host",
        "is_bad",
        "lane",
        "model_version",
        "outcome",
        "request_id",
        "sampling",
        "stream",
        "tenant_hash",
        "user_agent",
        "worker",
    }
)
ALIASES: Mapping[str, str] = {"tenant": "tenant_hash", "request": "request_id"}

_TOKEN = re.compile(
    r"""\s*(?:(?P<quoted>"[^"]*"|'[^']*')|(?P<op>==|!=|<=|>=|[=<>~(),])|(?P<word>[^\s=<>!~(),"']+))"""
)
_COMPARISONS = {"=": "=", "==": "=", "!=": "<>", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


class BadCondition(ValueError):
    """A condition that cannot be read; the message says where and what is known."""


@dataclass(frozen=True, slots=True)
class Condition:
    """``sql`` is a boolean expression over ``requests``; NULL counts as false."""

    text: str
    sql: str
    values: list[str | float]


def condition_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command --bad; it takes it as ``bad``, a :class:`Condition` or None."""
    return click.option(
        "--bad",
        callback=_option,
        metavar="CONDITION",
        help="Which requests are bad, such as 'code = CUDA_OOM', 'ttft > 2 and lane = flex', "
        "'worker in (a, b)', 'user_agent ~ curl'. Default: failed, lost and slow ones.",
    )(command)


def _option(_: click.Context, __: click.Parameter, text: str | None) -> Condition | None:
    try:
        return None if text is None else parse(text)
    except BadCondition as error:
        raise click.BadParameter(str(error)) from error


def parse(text: str) -> Condition:
    """Read a condition. Raises: BadCondition."""
    reader = _Reader(text, _tokens(text))
    sql = reader.either()
    if reader.tokens:
        raise BadCondition(f"{text!r}: did not expect {reader.tokens[0]!r}")
    return Condition(text, f"coalesce({sql}, false)", reader.values)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    place = 0
    while place < len(text.rstrip()):
        match = _TOKEN.match(text, place)
        if match is None:
            raise BadCondition(f"{text!r}: cannot read {text[place:].strip()!r}")
        tokens.append(match.group().strip())
        place = match.end()
    return tokens


@dataclass
class _Reader:
    """Recursive descent: either (or) over both (and) over one (not, parentheses, comparison)."""

    text: str
    tokens: list[str]
    values: list[str | float] = field(default_factory=list[str | float])

    def either(self) -> str:
        parts = [self._both()]
        while self._takes("or"):
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else f"({' OR '.join(parts)})"

    def _both(self) -> str:
        parts = [self._one()]
        while self._takes("and"):
            parts.append(self._one())
        return parts[0] if len(parts) == 1 else f"({' AND '.join(parts)})"

    def _one(self) -> str:
        if self._takes("not"):
            return f"(NOT coalesce({self._one()}, false))"
        if self._takes("("):
            inner = self.either()
            self._need(")")
            return inner
        return self._comparison()

    def _comparison(self) -> str:
        name = self._next("a field")
        column = ALIASES.get(name, name)
        if column not in NUMBERS | WORDS:
            known = ", ".join(sorted(NUMBERS | WORDS))
            raise BadCondition(f"{self.text!r}: {name!r} is no field; there are {known}")
        if self._takes("in"):
            return self._listed(column)
        if self._takes("~"):
            self.values.append(_unquoted(self._next("a text")))
            return f"contains(CAST({column} AS VARCHAR), ?)"
        operator = self._next("a comparison")
        if operator not in _COMPARISONS:
            raise BadCondition(f"{self.text!r}: {operator!r} behind {name} is no comparison")
        return self._compared(column, _COMPARISONS[operator])

    def _compared(self, column: str, operator: str) -> str:
        value = self._next("a value")
        if value.lower() == "null":
            return f"({column} IS {'NOT ' if operator == '<>' else ''}NULL)"
        if column in NUMBERS:
            self.values.append(self._number(value))
            return f"({column} {operator} ?)"
        self.values.append(_unquoted(value))
        if operator == "<>":
            return f"(CAST({column} AS VARCHAR) IS DISTINCT FROM ?)"
        return f"(CAST({column} AS VARCHAR) {operator} ?)"

    def _listed(self, column: str) -> str:
        self._need("(")
        parts = [self._compared(column, "=")]
        while self._takes(","):
            parts.append(self._compared(column, "="))
        self._need(")")
        return f"({' OR '.join(parts)})"

    def _number(self, value: str) -> float:
        try:
            return float(value)
        except ValueError:
            raise BadCondition(f"{self.text!r}: {value!r} is no number") from None

    def _takes(self, word: str) -> bool:
        if self.tokens and self.tokens[0].lower() == word:
            self.tokens.pop(0)
            return True
        return False

    def _next(self, what: str) -> str:
        if not self.tokens:
            raise BadCondition(f"{self.text!r}: {what} is missing at the end")
        return self.tokens.pop(0)

    def _need(self, word: str) -> None:
        if not self._takes(word):
            raise BadCondition(f"{self.text!r}: {word!r} is missing")


def _unquoted(value: str) -> str:
    return value[1:-1] if value[:1] in {'"', "'"} else value
