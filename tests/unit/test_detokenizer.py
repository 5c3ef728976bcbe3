"""Token ids to text: what is shown when, in the two families of tokenizers."""

import pytest

from common.models.tokenizer import Tokenizer
from tests.support.engines import byte_fallback_tokenizer
from tests.support.tiny_model import build_tokenizer
from workers.engine.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer(build_tokenizer(), {})


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [detokenizer.push(id) for id in ids]


def id_of(tokenizer: Tokenizer, name: str) -> int:
    id = tokenizer._backend.token_to_id(name)
    assert id is not None
    return id


def byte_ids(text: str) -> list[int]:
    """As tokens of one byte each, which begin behind three others."""
    return [3 + byte for byte in text.encode()]


def test_half_a_character_waits_for_its_other_half(byte_level: Tokenizer) -> None:
    """An emoji of several tokens comes out whole, with the last of them."""
    ids = byte_level.encode("a👍b")
    got = pieces(Detokenizer(byte_level), ids)
    assert "".join(got) == "a👍b"
    assert set(got) == {"a", "", "👍", "b"}


def test_special_tokens_have_no_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<|im_end|>b")
    assert pieces(Detokenizer(byte_level), ids) == ["a", "", "b"]


def test_bytes_that_are_no_character_are_shown_once_that_is_certain(byte_level: Tokenizer) -> None:
    half, letter = byte_level.encode("👍")[0], byte_level.encode("x")[0]
    assert pieces(Detokenizer(byte_level), [half, letter]) == ["", "\ufffdx"]


def test_flush_shows_half_a_character_as_it_stands(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level)
    assert pieces(detokenizer, byte_level.encode("👍")[:1]) == [""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_the_first_piece_keeps_its_space_behind_a_prompt() -> None:
    """Prompt and answer joined must read as if they had been decoded together."""
    tokenizer = byte_fallback_tokenizer()
    word = id_of(tokenizer, "▁a")
    assert pieces(Detokenizer(tokenizer, [word]), [word]) == [" a"]
    assert pieces(Detokenizer(tokenizer), [word]) == ["a"]


def test_a_run_of_byte_tokens_is_shown_at_its_end() -> None:
    """Decoders with byte fallback take a run as a whole: one bad byte spoils all of it."""
    tokenizer = byte_fallback_tokenizer()
    euro, word = byte_ids("€"), id_of(tokenizer, "ok")
    assert pieces(Detokenizer(tokenizer), [*euro, word]) == ["", "", "", "€ok"]
    spoilt = [*byte_ids("A"), euro[0]]
    assert pieces(Detokenizer(tokenizer), [*spoilt, word]) == [
        "",
        "",
        "\ufffd\ufffdok",
    ]


def test_a_prompt_that_ends_in_byte_tokens_is_not_cut_inside_a_character() -> None:
    tokenizer = byte_fallback_tokenizer()
    prompt = [id_of(tokenizer, "a"), *byte_ids("€€€")]
    word = id_of(tokenizer, "ok")
    assert pieces(Detokenizer(tokenizer, prompt), [word]) == ["ok"]


def test_only_tokenizers_with_byte_fallback_have_byte_tokens(byte_level: Tokenizer) -> None:
    assert byte_level.byte_ids == frozenset()
    assert byte_fallback_tokenizer().byte_ids == frozenset(range(3, 259))
