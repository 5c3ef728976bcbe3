"""Limits of a body's shape: what lies within passes, one more does not, and broken JSON is left to
the parser.
"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.failures import Failure
from gateway.json_limits import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_ITEMS,
    MAX_TEXT_CHARACTERS,
    MAX_TEXTS,
    check_json,
)


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def rows(count: int, of: bytes) -> bytes:
    return b"[" + b",".join([of] * count) + b"]"


WITHIN: list[bytes] = [
    nested(MAX_DEPTH),
    b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH,
    rows(MAX_ITEMS, b"1"),
    rows(MAX_ITEMS, b"{}"),
    rows(3, rows(MAX_ITEMS, b"1")),
    b"{" + b",".join(b'"%d":0' % index for index in range(MAX_ITEMS)) + b"}",
    rows(2, rows(MAX_CONTAINERS // 2 - 2, b"[]")),
    json.dumps("a" * MAX_TEXT_CHARACTERS).encode(),
    json.dumps("é\u2028" * (MAX_TEXT_CHARACTERS // 2)).encode(),
    "\U0001f600".encode() * 4,
    json.dumps("é" * MAX_TEXT_CHARACTERS, ensure_ascii=False).encode(),
    b"1" * MAX_DIGITS,
    json.dumps('[[[{{{,,,"\\' * 1000).encode(),
    json.dumps({'[\\"{': "\\"}).encode(),
]
BEYOND: list[tuple[bytes, str]] = [
    (nested(MAX_DEPTH + 1), "nested"),
    (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "nested"),
    (nested(1_000_00), "lists and objects"),
    (b"[" * 1000, "nested"),
    (rows(MAX_ITEMS + 1, b"1"), "members"),
    (rows(MAX_ITEMS + 1, b"{}"), "members"),
    (rows(MAX_ITEMS + 1, b'"a"'), "members"),
    (b'{"a":' * 5 + rows(MAX_ITEMS + 1, b"1") + b"}" * 5, "members"),
    (b"{" + b",".join(b'"%d":0' % index for index in range(MAX_ITEMS + 1)) + b"}", "members"),
    (rows(21, rows(MAX_ITEMS, b"1")), "values"),
    (rows(3, rows(MAX_CONTAINERS // 2, b"[]")), "lists and objects"),
    (rows(MAX_TEXTS + 1, b'""'), "texts"),
    (json.dumps("a" * (MAX_TEXT_CHARACTERS + 1)).encode(), "characters"),
    (json.dumps("é" * (MAX_TEXT_CHARACTERS + 1)).encode(), "characters"),
    (b'{"seed":' + b"1" * (MAX_DIGITS + 1) + b"}", "digits"),
    (b"[0." + b"1" * MAX_DIGITS + b"]", "digits"),
]


@pytest.mark.parametrize("body", WITHIN, ids=range(len(WITHIN)))
def test_what_lies_within_the_limits_passes(body: bytes) -> None:
    check_json(body)


@pytest.mark.parametrize(("body", "limit"), BEYOND, ids=range(len(BEYOND)))
def test_one_more_is_refused_and_the_limit_named(body: bytes, limit: str) -> None:
    with pytest.raises(Failure) as caught:
        check_json(body)
    assert caught.value.code == "BODY_TOO_LARGE"
    assert limit in caught.value.message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"}", b"[}", b'"', b'{"a"', b"]][[", b"[1,,2]", b"\xff\x00", b'"\\', b",,,"]
)
def test_what_is_no_json_is_left_to_the_parser(body: bytes) -> None:
    check_json(body)


def test_a_longer_list_may_be_allowed_where_it_is_a_prompt() -> None:
    check_json(rows(MAX_ITEMS + 5, b"1"), MAX_ITEMS + 5)
    with pytest.raises(Failure):
        check_json(rows(MAX_ITEMS + 6, b"1"), MAX_ITEMS + 5)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=40,
)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


@given(value=VALUES, wraps=st.integers(0, 40), is_ascii=st.booleans())
def test_any_json_is_refused_for_its_depth_alone(value: Any, wraps: int, is_ascii: bool) -> None:
    """Whatever its texts hold: brackets, quotes, backslashes."""
    for _ in range(wraps):
        value = [value]
    try:
        check_json(json.dumps(value, ensure_ascii=is_ascii).encode())
        is_refused = False
    except Failure:
        is_refused = True
    assert is_refused == (depth(value) > MAX_DEPTH)
