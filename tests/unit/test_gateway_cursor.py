"""Cursors: what a client sends back is what it was given, and nothing else is taken for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.failures import Failure
from gateway.cursor import Cursor, chain_before, chains_after, parse_cursor

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=8)
CHAINS = st.integers(0, 2**32 - 1)


@given(st.integers(1, 10**9 - 1), CHAINS, st.integers(0, 3))
def test_a_cursor_survives_the_way_to_the_client_and_back(
    position: int, chain: int, stage: int
) -> None:
    cursor = Cursor(position, chain, stage)
    assert parse_cursor(str(cursor), "after") == cursor


@given(CHAINS, TOKENS)
def test_the_chain_runs_backwards(chain: int, tokens: list[int]) -> None:
    """So an entry of the log explains itself to a reader that knows no chain yet."""
    chains = [chain, *chains_after(chain, tokens)]
    assert chain_before(chains[-1], tokens) == chain


def test_the_beginning_has_no_chain_to_check() -> None:
    assert str(Cursor()) == "0-00000000"
    assert parse_cursor("0-00000000", "after") == Cursor()


def test_a_bare_position_is_taken_without_a_chain_check() -> None:
    assert parse_cursor("57", "after") == Cursor(57, None)


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "57-", "57-xyz", "57-0A1B2C3D", "57-0a1b2c3d.4", "1e3", "9" * 10]
)
def test_what_is_no_cursor_is_refused_by_the_name_of_its_field(text: str) -> None:
    with pytest.raises(Failure) as caught:
        parse_cursor(text, "Last-Event-ID")
    assert (caught.value.code, caught.value.field) == ("BAD_REQUEST", "Last-Event-ID")
