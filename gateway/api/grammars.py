"""What clients write to constrain an answer, and the one grammar that each of it means.

TGI's ``grammar``, OpenAI's ``response_format`` in its own shape and in TGI's, and vLLM's
``guided_…`` and ``structured_outputs``. Only the shape is checked here. Whether a grammar compiles,
and within its budget, the worker finds out: it alone has the vocabulary.
"""

from typing import Any

import msgspec

from common.failures import Failure
from common.messages import Grammar
from gateway.bodies import unsupported

MAX_GRAMMAR_BYTES = 256 * 1024
"""Schemas of real programs have up to some 50 KB; a grammar is stored with each request."""
MAX_CHOICES = 1024

_ANY_OBJECT = '{"type":"object"}'
_REGEX_SIGNS = frozenset(r"\.+*?()|[]{}^$")
"""What a regular expression gives a meaning to, in any dialect."""


def tgi_grammar(field: str, asked: Any) -> Grammar | None:
    """TGI's ``{"type": "json" | "json_schema" | "regex", "value": …}``, and ``ebnf`` likewise.

    Raises: Failure BAD_REQUEST, also for a schema without properties, as TGI has it.
    """
    if asked is None:
        return None
    kind = asked.get("type") if isinstance(asked, dict) else None
    if not isinstance(kind, str) or kind not in _TGI_KINDS:
        raise _invalid(field, f"`{field}.type` must be one of {', '.join(_TGI_KINDS)}")
    if "value" not in asked:
        raise _invalid(field, f"`{field}` misses the field `value`")
    value = asked["value"]
    if kind == "json_schema":
        value = _member(f"{field}.value", value, "schema")
    grammar = _grammar(f"{field}.value", _TGI_KINDS[kind], value)
    if grammar.kind == "json_schema" and "properties" not in msgspec.json.decode(grammar.value):
        reason = "grammar is not valid: Grammar must have a 'properties' field"
        raise _invalid(f"{field}.value", reason)
    return grammar


_TGI_KINDS = {
    "json": "json_schema",
    "json_object": "json_schema",
    "json_schema": "json_schema",
    "regex": "regex",
    "ebnf": "ebnf",
}


def grammar_of(response_format: Any, guided: dict[str, Any]) -> Grammar | None:
    """The grammar of a request to ``/v1``, if any.

    ``guided`` maps vLLM's names (``guided_json``, ``structured_outputs``) to their values.

    Raises: Failure BAD_REQUEST, also when an answer is constrained twice.
    """
    given = {name: value for name, value in guided.items() if value is not None}
    if "structured_outputs" in given:
        given |= _structured(given.pop("structured_outputs"))
    formatted = _response_format(response_format)
    names = ["response_format"] * (formatted is not None) + list(given)
    if len(names) > 1:
        listed = ", ".join(f"`{name}`" for name in names)
        raise _invalid(names[1], f"{listed}: an answer can be constrained by one of them only")
    return formatted or next((_guided(*item) for item in given.items()), None)


def _response_format(asked: Any) -> Grammar | None:
    """OpenAI's shape, or TGI's, which has the schema in a ``value``."""
    if asked is None:
        return None
    field = "response_format"
    match asked:
        case {"type": "text"}:
            return None
        case {"type": "json_schema", "json_schema": wrapped}:
            schema = _member(f"{field}.json_schema", wrapped, "schema")
            return _grammar(f"{field}.json_schema.schema", "json_schema", schema)
        case {"type": "json_object", **rest} if rest.get("value") is None:
            return Grammar("json_schema", _ANY_OBJECT)
        case _:
            return tgi_grammar(field, asked)


def _guided(name: str, value: Any) -> Grammar:
    kind = _GUIDED_KINDS[name.removeprefix("guided_").removeprefix("structured_outputs.")]
    return _choices(name, value) if kind == "choice" else _grammar(name, kind, value)


def _structured(asked: Any) -> dict[str, Any]:
    """The members of ``structured_outputs`` that constrain, by their paths."""
    if not isinstance(asked, dict):
        raise _invalid("structured_outputs", "`structured_outputs` must be an object")
    given = {name: value for name, value in asked.items() if value not in (None, False)}
    for name in given.keys() - _GUIDED_KINDS.keys():
        raise unsupported(f"structured_outputs.{name}")
    return {f"structured_outputs.{name}": value for name, value in given.items()}


_GUIDED_KINDS = {"json": "json_schema", "regex": "regex", "grammar": "ebnf", "choice": "choice"}


def _grammar(field: str, kind: Any, value: Any) -> Grammar:
    text = _schema(field, value) if kind == "json_schema" else value
    if not isinstance(text, str) or not text:
        raise _invalid(field, f"`{field}` must be a text that is not empty")
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        limit = MAX_GRAMMAR_BYTES // 1024
        raise _invalid(field, f"`{field}`: a grammar may have at most {limit} KiB")
    return Grammar(kind, text)


def _schema(field: str, value: Any) -> str:
    """A JSON schema as text, its members in the order given: answers have the same order."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _invalid(field, f"`{field}`: grammar is not valid: {error}") from error
    if not isinstance(value, dict):
        raise _invalid(field, f"`{field}`: grammar is not supported: a JSON schema is an object")
    try:
        return msgspec.json.encode(value).decode()
    except RecursionError as error:
        raise _invalid(field, f"`{field}`: the schema is nested too deeply") from error


def _choices(field: str, value: Any) -> Grammar:
    is_list = isinstance(value, list) and 0 < len(value) <= MAX_CHOICES
    if not is_list or not all(isinstance(text, str) and text for text in value):
        raise _invalid(field, f"`{field}` must be a list of 1 to {MAX_CHOICES} texts")
    return _grammar(field, "regex", "|".join(map(_escaped, value)))


def _escaped(text: str) -> str:
    return "".join("\\" + sign if sign in _REGEX_SIGNS else sign for sign in text)


def _member(field: str, value: Any, name: str) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise _invalid(field, f"`{field}` misses the field `{name}`")
    return value[name]


def _invalid(field: str, message: str) -> Failure:
    return Failure("BAD_REQUEST", message, field=field)
