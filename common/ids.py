"""Identifiers: who names what, and what a valid name looks like.

A request has one id; its choices are generations named ``<request>.<choice>``. A process
incarnation (a worker, a gateway) draws a new name at every start: a restarted process is a stranger
to the leases of its predecessor.
"""

import re
import secrets

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{8,48}")


def new_request_id() -> str:
    """128 random bits as 32 hex digits: unguessable, and safe in a URL, a header and a key."""
    return secrets.token_hex(16)


def is_request_id(text: str) -> bool:
    return _REQUEST_ID.fullmatch(text) is not None


def generation_id(request_id: str, choice: int = 0) -> str:
    return f"{request_id}.{choice}"


def request_of(generation_id: str) -> str:
    """The request that a generation belongs to."""
    return generation_id.rpartition(".")[0]


def choice_of(generation_id: str) -> int:
    return int(generation_id.rpartition(".")[2])


def new_process_name(role: str) -> str:
    """12 characters: one letter for the role (``w``, ``g``, ``b``) and 11 random hex digits.

    Short because a generation lists its readers by name in one field that must stay under 64 bytes.
    """
    return role[0] + secrets.token_hex(6)[:11]


def new_nonce() -> str:
    """64 random bits, drawn for each claim call; half of a fence."""
    return secrets.token_hex(8)
