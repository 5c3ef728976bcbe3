"""What requests say of tools, on both of OpenAI's APIs: the functions, the choice, the history.

A model that knows tools by its chat template is told of them by it. Any other is told in the system
message, and calls and results stand in its conversation as text. In both cases a grammar holds the
answer to calls that can be read.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.failures import Failure
from common.messages import Grammar
from gateway.api.grammars import MAX_GRAMMAR_BYTES
from gateway.bodies import unsupported
from gateway.services import Offer
from gateway.tool_calls import Tool, call_text, calls_grammar, instructions, result_text

MAX_TOOLS = 128
MAX_DESCRIPTION_CHARACTERS = 16_384

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, and whether and how the answer may call them."""

    tools: list[Tool]
    """Those that may be called."""
    may_talk: bool
    is_parallel: bool

    def grammar(self, form: Grammar | None) -> Grammar:
        """Of the answer; ``form`` is what its text must match.

        Raises: Failure BAD_REQUEST.
        """
        if form is not None and form.kind != "json_schema":
            raise _invalid(
                "tools", "`tools` can be combined with a JSON schema, with no other constraint"
            )
        text = calls_grammar(
            self.tools,
            may_talk=self.may_talk,
            is_parallel=self.is_parallel,
            talk_schema=form.value if form else None,
        )
        if len(text.encode()) > MAX_GRAMMAR_BYTES:
            limit = MAX_GRAMMAR_BYTES // 1024
            raise _invalid("tools", f"`tools`: all schemas together may have {limit} KiB")
        return Grammar("ebnf", text)


def tool_use(tools: Any, choice: Any, *, parallel: bool | None) -> ToolUse | None:
    """``tools`` in a chat's form (:func:`chat_form` makes it); None: the answer calls none.

    Raises: Failure BAD_REQUEST, UNSUPPORTED_PARAMETER.
    """
    known = _tools(tools)
    allowed, may_talk = _choice(choice, known)
    if not allowed:
        return None
    return ToolUse(allowed, may_talk, parallel is not False)


def _tools(given: Any) -> list[Tool]:
    if given is None:
        return []
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        raise _invalid("tools", f"`tools` must be a list of up to {MAX_TOOLS} tools")
    tools = [_tool(f"tools[{index}]", tool) for index, tool in enumerate(given)]
    names = [tool.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise _invalid(f"tools[{index}].function.name", f"two tools are called {name!r}")
    return tools


def _tool(field: str, given: Any) -> Tool:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind != "function":
        raise unsupported(f"{field}.type", f"is {str(kind)[:80]!r}; only functions are supported")
    function = given.get("function")
    if not isinstance(function, dict):
        raise _invalid(f"{field}.function", f"`{field}.function` must be an object")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _invalid(
            f"{field}.function.name",
            f"`{field}.function.name` must have 1 to 64 letters, digits, `_` or `-`",
        )
    description = function.get("description") or ""
    if not isinstance(description, str) or len(description) > MAX_DESCRIPTION_CHARACTERS:
        raise _invalid(
            f"{field}.function.description",
            f"`{field}.function.description` must be a text of up to "
            f"{MAX_DESCRIPTION_CHARACTERS} characters",
        )
    parameters = function.get("parameters")
    if parameters is None:
        parameters = function.get("arguments")  # TGI's name
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise _invalid(
            f"{field}.function.parameters",
            f"`{field}.function.parameters` must be the JSON schema of an object",
        )
    return Tool(name, description, parameters, is_strict=function.get("strict") is True)


def _choice(choice: Any, tools: list[Tool]) -> tuple[list[Tool], bool]:
    """Which tools may be called, and whether the answer may be text."""
    match choice:
        case None | "auto":
            return tools, True
        case "none":
            return [], True
        case "required" | "any":
            return _some(tools), False
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(named)}}:
            if mode not in ("auto", "required"):
                raise _invalid("tool_choice", "`tool_choice`: mode must be one of auto, required")
            names = [_named(entry) for entry in named]
            return _some([_find(tools, name) for name in names]), mode == "auto"
        case str() | {"function": {"name": str()}}:
            return [_find(tools, _named(choice))], False
        case _:
            raise _invalid(
                "tool_choice", "`tool_choice` must be none, auto, required, or name a function"
            )


def _some(tools: list[Tool]) -> list[Tool]:
    if not tools:
        raise _invalid("tool_choice", "`tool_choice` needs `tools`")
    return tools


def _named(entry: Any) -> Any:
    match entry:
        case {"function": {"name": name}}:
            return name
        case _:
            return entry


def _find(tools: list[Tool], name: Any) -> Tool:
    for tool in tools:
        if tool.name == name:
            return tool
    message = f"Tool error: Tool with name {str(name)[:64]} not found"  # TGI's words
    raise _invalid("tool_choice", message)


def chat_form(tools: Any, choice: Any) -> tuple[Any, Any]:
    """Tools and choice of a response, which names a function flatly, as a chat has them."""
    if isinstance(tools, list):
        tools = [_wrapped(tool) for tool in tools]
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        inner = {"mode": choice.get("mode"), "tools": [_wrapped(it) for it in _list(choice)]}
        choice = {"type": "allowed_tools", "allowed_tools": inner}
    return tools, _wrapped(choice)


def _list(choice: dict[str, Any]) -> list[Any]:
    tools = choice.get("tools")
    return tools if isinstance(tools, list) else []


def _wrapped(given: Any) -> Any:
    match given:
        case {"type": "function", "name": _, **_rest} if "function" not in given:
            return {
                "type": "function",
                "function": {k: v for k, v in given.items() if k != "type"},
            }
        case _:
            return given


# The conversation --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SaidCall:
    """A call that the model made before."""

    id: str
    name: str
    arguments: Any


@dataclass(frozen=True, slots=True)
class Said:
    """A message of any role. ``calls`` are the assistant's, ``call_id`` is what a tool answers."""

    role: str
    text: str
    calls: Sequence[SaidCall] = ()
    call_id: str = ""


def said_call(field: str, id: Any, name: Any, arguments: Any) -> SaidCall:
    """Arguments come as the text that the model wrote, or as TGI's object.

    Raises: Failure BAD_REQUEST.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _invalid(f"{field}.name", f"`{field}.name` must be the name of a function")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise _invalid(
                f"{field}.arguments", f"`{field}.arguments` must be JSON: {error}"
            ) from error
    return SaidCall(str(id or ""), name, arguments)


async def render(
    offer: Offer, conversation: Sequence[Said], use: ToolUse | None, *, continues: bool
) -> str:
    """The prompt's text for ``conversation``.

    Raises: Failure TEMPLATE_ERROR.
    """
    template = offer.model.chat_template
    if template.takes_tools:
        messages = [_native(message, conversation) for message in conversation]
        shown = [tool.shown() for tool in use.tools] if use else None
    else:
        messages, shown = _told(conversation, use), None
    return await template.render_async(
        messages,
        tools=shown,
        add_generation_prompt=not continues,
        continue_final_message=continues,
    )


def _native(message: Said, conversation: Sequence[Said]) -> dict[str, Any]:
    """As templates that know tools take it."""
    made: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.calls
        ]
    if message.role == "tool":
        made["tool_call_id"] = message.call_id
        calls = (call for said in conversation for call in said.calls)
        made["name"] = next((call.name for call in calls if call.id == message.call_id), "")
    return made


def _told(conversation: Sequence[Said], use: ToolUse | None) -> list[dict[str, Any]]:
    """All in text. Results of several calls are one message, as roles must take turns."""
    messages: list[dict[str, Any]] = []
    follows_result = False
    for said in conversation:
        is_result = said.role == "tool"
        text = "\n".join(
            [
                *([said.text] if said.text and not is_result else []),
                *(call_text(call.name, call.arguments) for call in said.calls),
                *([result_text(said.text)] if is_result else []),
            ]
        )
        if is_result and follows_result:
            messages[-1]["content"] += "\n" + text
        else:
            messages.append({"role": "user" if is_result else said.role, "content": text})
        follows_result = is_result
    if use is None:
        return messages
    told = instructions(use.tools)
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] += "\n\n" + told
        return messages
    return [{"role": "system", "content": told}, *messages]


def _invalid(field: str, message: str) -> Failure:
    return Failure("BAD_REQUEST", message, field=field)
