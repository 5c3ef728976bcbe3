"""Tool calls in a model's text: how they are written there, and how they are read back.

A call is written as the models of the Hermes and Qwen families write it; those of other families
are told to, in the prompt. A grammar holds the answer to this form, letter by letter::

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Text may stand ahead of the first call, none behind it.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_.-]{1,128})"\s*,\s*"arguments"\s*:\s*')
_MAX_HEAD_CHARACTERS = 400
"""A call that has not named its function by then is none."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]
    is_strict: bool = False
    """True: a keyword of the schema that cannot be held is refused; False: it is ignored."""

    def shown(self) -> dict[str, Any]:
        """As templates and prompts know it."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        return {"type": "function", "function": function}


# Writing -----------------------------------------------------------------------------------------


def call_text(name: str, arguments: Any) -> str:
    """A call as it stands in a conversation."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{OPEN}\n{call}\n{CLOSE}"


def result_text(result: str) -> str:
    """What a function has answered, in a message of the user's."""
    return f"<tool_response>\n{result}\n</tool_response>"


def instructions(tools: Sequence[Tool]) -> str:
    """What a model whose template knows no tools is told about them."""
    listed = "\n".join(json.dumps(tool.shown()["function"], ensure_ascii=False) for tool in tools)
    example = '{"name": "<name of the function>", "arguments": {<its arguments>}}'
    return (
        "These functions can be called, each described by a JSON object:\n"
        f"{listed}\n"
        "Where one of them helps, answer with the call, in this form and nothing behind it:\n"
        f"{OPEN}\n{example}\n{CLOSE}\n"
        "Where none of them helps, answer in plain words."
    )


def calls_grammar(
    tools: Sequence[Tool],
    *,
    may_talk: bool,
    is_parallel: bool,
    talk_schema: str | None = None,
) -> str:
    """The grammar, in llguidance's dialect of Lark, of answers that call ``tools``.

    ``may_talk``: an answer may also be plain text, or, where there is a ``talk_schema``, JSON of
    that form; else it is calls and nothing else.
    """
    more = f'("\\n{OPEN}" call)*' if is_parallel else ""
    rules = [f"calls: call {more}"]
    if not may_talk:
        rules.insert(0, f'start: "{OPEN}" calls')
    elif talk_schema is not None:
        rules.insert(0, f'start: "{OPEN}" calls | talk')
        rules.append(f"talk: %json {talk_schema}")
    else:
        # A lexer does not look back: the text ahead of a call must end with what opens it.
        rules.insert(0, "start: head calls | TEXT?")
        rules.append(f'head[suffix="{OPEN}"]: /(?s:.*)/')
        rules.append(f"TEXT: /(?s:.+)/ & ~/(?s:.*){OPEN}(?s:.*)/")
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        begin = json.dumps(f'\n{{"name": "{tool.name}", "arguments": ')
        rules.append(f'call_{i}: {begin} args_{i} "}}\\n{CLOSE}"')
        rules.append(f"args_{i}: %json {json.dumps(_arguments_schema(tool))}")
    return "\n".join(rules)


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    """Without free space, in which weak models lose their way, or names that nobody described."""
    schema = {"type": "object"} | tool.parameters
    if "properties" in schema or not tool.parameters:
        schema.setdefault("additionalProperties", False)
    rules = {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
        "lenient": not tool.is_strict,
    }
    return schema | {"x-guidance": rules}


# Reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    index: int
    text: str
    """The next part of the JSON."""


@dataclass(frozen=True, slots=True)
class CallEnds:
    index: int


Part = Text | CallBegins | Arguments | CallEnds


class CallReader:
    """Reads an answer as it comes. What comes out depends on the text alone, not on how it is cut.

    Text that may be the beginning of a call is held back until it is clear. What looks like a call
    and is none stays text.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""
        self._read = self._read_text
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def feed(self, text: str) -> list[Part]:
        """What ``text`` adds."""
        self._held += text
        parts: list[Part] = []
        while self._read(parts):
            pass
        return parts

    def close(self) -> list[Part]:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        if self._read == self._read_head:
            held = OPEN + held
        elif self._read != self._read_text:
            return []  # inside of a call that was cut off, or behind its arguments
        self._read = self._read_text
        return [Text(held)] if held and (held.strip() or not self.num_calls) else []

    def _read_text(self, parts: list[Part]) -> bool:
        before, opened, rest = self._held.partition(OPEN)
        kept = 0 if opened else _overlap(before)
        shown, held = before[: len(before) - kept], before[len(before) - kept :]
        if self.num_calls and not shown.strip():
            held, shown = ("" if opened else shown + held), ""  # space between calls
        if shown:
            parts.append(Text(shown))
        self._held = rest if opened else held
        if opened:
            self._read = self._read_head
        return bool(opened)

    def _read_head(self, parts: list[Part]) -> bool:
        match = _HEAD.match(self._held)
        if match is not None and match.end() < len(self._held):
            parts.append(CallBegins(self.num_calls, match[1]))
            self.num_calls += 1
            self._held = self._held[match.end() :]
            self._depth, self._in_string, self._is_escaped = 0, False, False
            self._read = self._read_arguments
            return True
        if match is None and (CLOSE in self._held or len(self._held) > _MAX_HEAD_CHARACTERS):
            parts.append(Text(OPEN))
            self._read = self._read_text
            return True
        return False

    def _read_arguments(self, parts: list[Part]) -> bool:
        """Up to the bracket that closes the first one; its own depth is 1."""
        index = self.num_calls - 1
        for at, sign in enumerate(self._held):
            self._step(sign)
            if self._depth == 0 and not self._in_string:
                parts += [Arguments(index, self._held[: at + 1]), CallEnds(index)]
                self._held = self._held[at + 1 :]
                self._read = self._read_tail
                return True
        if self._held:
            parts.append(Arguments(index, self._held))
        self._held = ""
        return False

    def _step(self, sign: str) -> None:
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif sign == "\\":
                self._is_escaped = True
            elif sign == '"':
                self._in_string = False
        elif sign == '"':
            self._in_string = True
        elif sign in "{[":
            self._depth += 1
        elif sign in "}]":
            self._depth -= 1

    def _read_tail(self, parts: list[Part]) -> bool:  # noqa: ARG002 - as the others
        _, closed, rest = self._held.partition(CLOSE)
        if not closed:
            return False
        self._held = rest
        self._read = self._read_text
        return True


def _overlap(text: str) -> int:
    """How much of the end of ``text`` may be the beginning of a call."""
    longest = min(len(text), len(OPEN) - 1)
    return next((n for n in range(longest, 0, -1) if OPEN.startswith(text[-n:])), 0)


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str


def read_answer(text: str) -> tuple[str, list[Call]]:
    """The text of a whole answer, and its calls."""
    reader = CallReader()
    return joined([*reader.feed(text), *reader.close()])


def joined(parts: Iterable[Part]) -> tuple[str, list[Call]]:
    text, names, arguments = "", list[str](), list[str]()
    for part in parts:
        match part:
            case Text(more):
                text += more
            case CallBegins(_, name):
                names.append(name)
                arguments.append("")
            case Arguments(index, more):
                arguments[index] += more
            case CallEnds():
                pass
    return text, [Call(*pair) for pair in zip(names, arguments, strict=True)]
