"""The items that go into a response: messages, calls and their results, as clients write them.

They are kept as they are shown again, and become messages of a conversation for the template.
"""

import secrets
from dataclasses import replace
from typing import Any

from common.failures import Failure
from gateway.api.chat import ROLES
from gateway.api.tools import Said, said_call
from gateway.bodies import unsupported

_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})


def items_of(given: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The input as items, each with an id."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not given:
        raise Failure("BAD_REQUEST", "`input` must not be empty", field="input")
    return [_item(f"input[{index}]", item) for index, item in enumerate(given)]


def _item(field: str, item: dict[str, Any]) -> dict[str, Any]:
    match item.get("type", "message"):
        case "message":
            return _message(field, item)
        case "function_call":
            said_call(field, item.get("call_id"), item.get("name"), item.get("arguments"))
            kept = {name: item.get(name) for name in ("call_id", "name", "arguments")}
            return _kept("fc", "function_call", **kept)
        case "function_call_output":
            return _call_output(field, item)
        case other:
            raise unsupported(f"{field}.type", f"is {str(other)[:80]!r}, which is not supported")


def _kept(prefix: str, kind: str, **fields: Any) -> dict[str, Any]:
    id = f"{prefix}_{secrets.token_hex(12)}"
    return {"id": id, "type": kind, "status": "completed"} | fields


def _message(field: str, item: dict[str, Any]) -> dict[str, Any]:
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES or role == "tool":
        allowed = ", ".join(name for name in ROLES if name != "tool")
        raise _invalid(f"{field}.role", f"must be one of {allowed}")
    parts = _text_parts(f"{field}.content", item.get("content"), "input_text")
    return _kept("msg", "message", role=role, content=parts)


def _call_output(field: str, item: dict[str, Any]) -> dict[str, Any]:
    call_id, output = item.get("call_id"), item.get("output")
    if not isinstance(call_id, str):
        raise _invalid(f"{field}.call_id", "must be the id of a call")
    if not isinstance(output, str):
        output = _text_parts(f"{field}.output", output, "input_text")
    return _kept("fco", "function_call_output", call_id=call_id, output=output)


def _text_parts(field: str, content: Any, kind: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": kind, "text": content}]
    if not isinstance(content, list):
        raise _invalid(field, "must be a text or a list of parts")
    return [_text_part(f"{field}[{index}]", part) for index, part in enumerate(content)]


def _text_part(field: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise unsupported(f"{field}.type", f"is {str(kind)[:80]!r}; only text is supported")
    if not isinstance(part.get("text"), str):
        raise _invalid(f"{field}.text", "must be a text")
    return {"type": kind, "text": part["text"]}


def said_by(items: list[dict[str, Any]]) -> list[Said]:
    """Items as messages: calls belong to what the assistant said before them."""
    said: list[Said] = []
    for item in items:
        match item:
            case {"type": "message", "role": role, "content": content}:
                said.append(Said(ROLES[role], _text(content)))
            case {"type": "function_call", "call_id": id, "name": name, "arguments": arguments}:
                call = said_call("input", id, name, arguments)
                if said and said[-1].role == "assistant":
                    said[-1] = replace(said[-1], calls=[*said[-1].calls, call])
                else:
                    said.append(Said("assistant", "", [call]))
            case _:
                said.append(Said("tool", _text(item["output"]), call_id=item["call_id"]))
    return said


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _invalid(field: str, message: str) -> Failure:
    return Failure("BAD_REQUEST", f"`{field}` {message}", field=field)
