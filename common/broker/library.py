"""The function library: its text, and its name.

The name carries the protocol number and a hash of the text. A changed body is thus a new library by
construction: it is never loaded over an old one, and old processes go on calling theirs.
"""

import hashlib
from functools import cache
from importlib.resources import files

from common.messages import PROTOCOL


@cache
def _template() -> str:
    return files("common.broker").joinpath("functions.lua").read_text(encoding="utf-8")


@cache
def name() -> str:
    """``headrace_<protocol>_<8 hex digits>``."""
    digest = hashlib.sha256(_template().encode()).hexdigest()[:8]
    return f"headrace_{PROTOCOL}_{digest}"


@cache
def source() -> str:
    """What FUNCTION LOAD takes."""
    return _template().replace("@library@", name())
