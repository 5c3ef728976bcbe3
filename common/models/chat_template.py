"""The chat template of a stored model: messages in, the prompt's text out.

A template is code that came with a model. It runs in Jinja's immutable sandbox, with the globals
and filters that templates of the Hugging Face hub expect and no others, and under limits on its
input, its output, its loops and its arithmetic. Templates never come from a request, and the
sha256 of the one in use stands in the model's manifest.
"""

import asyncio
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from common.failures import Failure
from common.models.files import NAMED_TOKENS, JsonObject, read_json, token_text

Message = Mapping[str, Any]

_MAX_MESSAGES = 4096
_MAX_CHARACTERS = 16 * 1024 * 1024
"""Of all messages together, and of the rendered prompt: far above any request's body limit."""
_MAX_CPU_S = 2.0
"""Processor time of one rendering. Two thousand messages take 10 ms; who needs seconds is stuck."""
_INLINE_CHARACTERS = 10_000
_INLINE_MESSAGES = 64
"""Up to both, rendering stays under a millisecond and is not worth a thread."""

_CONTINUE_MARK = "\ue000continue-here\ue000 "
"""Private-use characters and a space: whether the space survives tells if the text was trimmed."""


class ChatTemplate:
    """Immutable after loading; rendering may be called from any thread."""

    def __init__(self, source: str | None, named_tokens: Mapping[str, str]) -> None:
        """``named_tokens`` are variables of the template: ``bos_token``, ``eos_token`` and so on.

        Raises:
            Failure: MODEL_LOAD_FAILED, if the source is no template.
        """
        self.source = source
        self.sha256 = "" if source is None else hashlib.sha256(source.encode()).hexdigest()
        self._named_tokens = dict(named_tokens)
        self.takes_tools = source is not None and _takes_tools(source)
        """Whether it tells the model of tools, and that calls stand between ``<tool_call>`` tags,
        as in the Hermes and Qwen families."""
        try:
            self._template = None if source is None else _ENVIRONMENT.compile_limited(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise Failure("MODEL_LOAD_FAILED", f"The chat template is broken: {error}") from error

    @classmethod
    def load(cls, path: Path) -> "ChatTemplate":
        """The template of the model directory ``path``; a model without one can still be loaded.

        Raises:
            Failure: MODEL_LOAD_FAILED, if its files cannot be used.
        """
        config_file = path / "tokenizer_config.json"
        config = read_json(config_file) if config_file.exists() else {}
        return cls(_find_source(path, config), _named_tokens(config))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt for ``messages``, as JSON would hold them, and ``tools`` likewise.

        ``continue_final_message`` ends the prompt inside the last message, for the model to go on
        from there; it excludes ``add_generation_prompt``, which is then ignored.

        Raises:
            Failure: TEMPLATE_ERROR, with what the template (or a limit) has to say.
        """
        _check_size(messages)
        if continue_final_message:
            return _cut_at_mark(self._run(_with_mark(messages), tools, False))
        return self._run(messages, tools, add_generation_prompt)

    async def render_async(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """As :meth:`render`, for an event loop: a long conversation is rendered in a thread."""

        def render() -> str:
            return self.render(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )

        num_characters = _characters([*messages, *(tools or [])])
        if len(messages) <= _INLINE_MESSAGES and num_characters <= _INLINE_CHARACTERS:
            return render()
        return await asyncio.to_thread(render)

    def _run(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> str:
        if self._template is None:
            raise _template_error("template not found")
        pieces: list[str] = []
        room = _MAX_CHARACTERS
        _FUEL.start()
        try:
            for piece in self._template.generate(
                messages=list(messages),
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._named_tokens,
            ):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    break
        except Exception as error:  # a template is foreign code and may raise anything
            raise _template_error(str(error) or type(error).__name__) from error
        if room < 0:
            raise _template_error(f"the prompt is longer than {_MAX_CHARACTERS} characters")
        return "".join(pieces)


def _template_error(reason: str) -> Failure:
    return Failure("TEMPLATE_ERROR", f"Template error: {reason}", field="messages")


class _Fuel(threading.local):
    """How long the rendering of this thread may go on, in processor time of this thread."""

    _end_s = 0.0

    def start(self) -> None:
        self._end_s = time.thread_time() + _MAX_CPU_S

    def burn(self) -> None:
        if time.thread_time() > self._end_s:
            raise jinja2.TemplateRuntimeError(f"the template ran longer than {_MAX_CPU_S} s")


_FUEL = _Fuel()


class _GenerationBlock(Extension):
    """``{% generation %}`` marks answers for training; here its content is all there is to it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so  # pyright: ignore[reportIncompatibleVariableOverride]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's ``namespace``, without attributes that would look like Python's own."""

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise SecurityError(f"{name!r} may not be set on a namespace")
        super().__setitem__(name, value)


class _Environment(ImmutableSandboxedEnvironment):
    """Burns fuel in every turn of every loop and macro, and bounds what a product can become."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def compile_limited(self, source: str) -> jinja2.Template:
        tree = _Bounded().visit(self.parse(source))
        for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            # An attribute of the environment cannot be named, and so not replaced, by a template.
            burn = nodes.Call(nodes.EnvironmentAttribute("burn"), [], [], None, None)
            cast("nodes.For", block).body.insert(0, nodes.ExprStmt(burn, lineno=block.lineno))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def burn(self) -> None:
        _FUEL.burn()

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "**" and isinstance(right, int) and right > 64:
            raise SecurityError("the exponent is too large")
        if operator == "*" and _repeated(left, right) > _MAX_CHARACTERS:
            raise SecurityError("the product is too long")
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
            _check_numbers(*(right if isinstance(right, tuple) else (right,)))
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(getattr(obj, "__wrapped__", obj), "__self__", None), str):
            _check_numbers(*args, *kwargs.values())
        return _bounded(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped

    def joined(self, *values: object) -> str:
        """What ``~`` makes of them."""
        return _bounded("".join(map(str, values)))


class _Bounded(NodeTransformer):
    """Sends each ``~`` through the environment: the sandbox itself does not look at it."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - Jinja's name
        self.generic_visit(node)
        joined = nodes.EnvironmentAttribute("joined")
        return nodes.Call(joined, node.nodes, [], None, None, lineno=node.lineno)


def _bounded(value: Any) -> Any:
    """A text that doubles must stop before it fills the memory, which takes less than a second."""
    if isinstance(value, str) and len(value) > _MAX_CHARACTERS:
        raise SecurityError("a text is too long")
    return value


def _check_numbers(*values: object) -> None:
    """What pads or fills a text is told how far."""
    for value in values:
        if isinstance(value, int) and value > _MAX_CHARACTERS:
            raise SecurityError(f"{value} is too large")


def _check_widths(pattern: str) -> None:
    """A format may name how wide a field shall be."""
    if _WIDE.search(pattern):
        raise SecurityError("the width of a field is too large")


_WIDE = re.compile(r"[0-9]{8}")


def _repeated(left: object, right: object) -> int:
    """The length of ``left * right`` where one of them is a sequence; else 0."""
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
            return len(sequence) * count
    return 0


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    for name in ("center", "format", "indent", "join", "replace"):
        environment.filters[name] = _bounded_filter(environment.filters[name])
    variables = cast("dict[str, object]", environment.globals)
    variables["raise_exception"] = _raise_exception
    variables["strftime_now"] = _strftime_now
    variables["namespace"] = _Namespace
    return environment


def _bounded_filter(make: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that can make much of little, between checks of what goes in and what comes out."""

    @wraps(make)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(*args, *kwargs.values())
        if make is do_format:
            _check_widths(str(args[0]))
        return _bounded(make(*args, **kwargs))

    return bounded


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own ``tojson`` escapes for HTML, which a prompt is not."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - templates print the local date


_ENVIRONMENT = _environment()


def _takes_tools(source: str) -> bool:
    return "<tool_call>" in source and re.search(r"\btools\b", source) is not None


def _find_source(path: Path, config: JsonObject) -> str | None:
    """A file of its own comes before the tokenizer's configuration; of several, the default."""
    jinja_file = path / "chat_template.jinja"
    if jinja_file.exists():
        try:
            return jinja_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Failure("MODEL_LOAD_FAILED", f"{jinja_file} cannot be read: {error}") from error
    json_file = path / "chat_template.json"
    value = (read_json(json_file) if json_file.exists() else config).get("chat_template")
    if isinstance(value, list):
        named = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
        value = named.get("default")
    return value if isinstance(value, str) else None


def _named_tokens(config: JsonObject) -> dict[str, str]:
    return {key: text for key in NAMED_TOKENS if (text := token_text(config, key)) is not None}


def _check_size(messages: Sequence[Message]) -> None:
    if not messages:
        raise _template_error("there are no messages")
    if len(messages) > _MAX_MESSAGES:
        raise _template_error(f"more than {_MAX_MESSAGES} messages")
    if _characters(messages) > _MAX_CHARACTERS:
        raise _template_error(f"the messages are longer than {_MAX_CHARACTERS} characters")


def _characters(messages: Sequence[Message]) -> int:
    """The length of all texts in the messages, however deep they lie."""
    total = 0
    pending: list[object] = list(messages)
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, Mapping):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    return total


def _with_mark(messages: Sequence[Message]) -> list[Message]:
    """The messages with a mark behind the last one's text."""
    content = messages[-1].get("content")
    if isinstance(content, str):
        marked: object = content + _CONTINUE_MARK
    else:
        marked = [dict(part) for part in content] if isinstance(content, list) else []
        texts = [part for part in marked if isinstance(part.get("text"), str)]
        if not texts:
            raise _template_error("there is no final message whose text could be continued")
        texts[-1]["text"] += _CONTINUE_MARK
    return [*messages[:-1], {**messages[-1], "content": marked}]


def _cut_at_mark(prompt: str) -> str:
    """The prompt up to the mark. A template that trims the mark would trim the text as well."""
    before, mark, after = prompt.rpartition(_CONTINUE_MARK.strip())
    if not mark:
        raise _template_error("it leaves the final message out, so it cannot be continued")
    return before if after.startswith(" ") else before.rstrip()
