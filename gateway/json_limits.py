"""How large, deep and long a JSON body may be, found out before anything is built of it.

The texts are cut out, and of the rest only brackets and commas are kept. Then innermost lists and
objects are taken away, level by level: what is left after the last level is too deep or too long.
Each step is one call in C, so that 2 MB take some milliseconds whatever they hold.
"""

import re
from functools import cache

from common.failures import Failure

MAX_DEPTH = 32
MAX_ITEMS = 10_000
"""Of one list or object."""
MAX_CONTAINERS = 20_000
"""Lists and objects of one body: some 4,000 messages in parts have so many."""
MAX_VALUES = 200_000
MAX_TEXTS = 100_000
"""Values and names alike."""
MAX_TEXT_CHARACTERS = 512 * 1024
MAX_DIGITS = 64
"""Of one number: no double needs more, and long ones take a time that grows with its square."""

_DIGITS = b"0123456789+-.eE"
_STRUCTURE = b"[]{},"
_ALL_DIGITS_0 = bytes.maketrans(_DIGITS, b"0" * len(_DIGITS))
_BESIDE_NUMBERS = bytes(set(range(256)) - set(_STRUCTURE + _DIGITS))


def check_json(body: bytes, max_items: int = MAX_ITEMS) -> None:
    """Leaves to the parser what is no JSON.

    Raises: Failure BODY_TOO_LARGE, which names the limit.
    """
    skeleton = _without_texts(body).translate(_ALL_DIGITS_0, _BESIDE_NUMBERS)
    if b"0" * (MAX_DIGITS + 1) in skeleton:
        raise _over(f"a number may have at most {MAX_DIGITS} digits")
    shape = skeleton.translate(None, b"0")
    num_commas = shape.count(b",")
    if num_commas >= MAX_VALUES:
        raise _over(f"it may have at most {MAX_VALUES} values")
    if len(shape) - num_commas > 2 * MAX_CONTAINERS:
        raise _over(f"it may have at most {MAX_CONTAINERS} lists and objects")
    _check_shape(shape, max_items)


def _without_texts(body: bytes) -> bytes:
    """What stands between the texts, which are checked."""
    if body.count(b'"') > 2 * MAX_TEXTS:
        raise _over(f"it may have at most {MAX_TEXTS} texts")
    parts = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
    longest = max(parts[1::2], key=len, default=b"")
    # A character has up to 4 bytes, or 12 where it is written in escapes.
    if len(longest) > MAX_TEXT_CHARACTERS and _num_characters(longest) > MAX_TEXT_CHARACTERS:
        raise _over(f"a text may have at most {MAX_TEXT_CHARACTERS} characters")
    return b"".join(parts[::2])


def _num_characters(text: bytes) -> int:
    return len(text.decode(errors="replace")) - 5 * text.count(b"\\u")


def _check_shape(shape: bytes, max_items: int) -> None:
    innermost = _innermost(max_items)
    for _ in range(MAX_DEPTH):
        shape, num_taken = innermost.subn(b"", shape)
        if not num_taken:
            break
    num_left = shape.count(b"[") + shape.count(b"{")
    if num_left > MAX_DEPTH or (num_left and innermost.search(shape)):
        raise _over(f"it may be nested at most {MAX_DEPTH} levels deep")
    if b"," * max_items in shape:
        raise _over(f"a list or object may have at most {max_items} members")


@cache
def _innermost(max_items: int) -> re.Pattern[bytes]:
    # Possessive: no second look at what did not fit.
    commas = rb",{0,%d}+" % (max_items - 1)
    return re.compile(rb"\[%b\]|\{%b\}" % (commas, commas))


def _over(limit: str) -> Failure:
    return Failure("BODY_TOO_LARGE", f"The body is over a limit: {limit}")
