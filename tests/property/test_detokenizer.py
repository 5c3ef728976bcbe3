"""For any token ids: the pieces together are the decoded text, and what was shown stays shown."""

from hypothesis import given
from hypothesis import strategies as st

from common.models.tokenizer import Tokenizer
from tests.support.engines import byte_fallback_tokenizer
from tests.support.tiny_model import build_tokenizer
from workers.engine.detokenizer import Detokenizer

BYTE_LEVEL = Tokenizer(build_tokenizer(), {})
BYTE_FALLBACK = byte_fallback_tokenizer()
TOKENIZERS = st.sampled_from([BYTE_LEVEL, BYTE_FALLBACK])
SOME_TEXT = st.text(alphabet=st.sampled_from("aé€👍 👩‍👩‍👧\n\ufffdthe"), max_size=20)


@st.composite
def ids_of(draw: st.DrawFn) -> tuple[Tokenizer, list[int]]:
    """Random ids, and ids of real text, mixed: both half characters and whole ones are common."""
    tokenizer = draw(TOKENIZERS)
    random = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12)
    encoded = SOME_TEXT.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    parts = draw(st.lists(st.one_of(random, encoded), max_size=4))
    return tokenizer, [id for part in parts for id in part]


@given(ids_of())
def test_pieces_are_the_decoded_text(case: tuple[Tokenizer, list[int]]) -> None:
    tokenizer, ids = case
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(id) for id in ids) + detokenizer.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=True)


@given(ids_of())
def test_what_is_shown_is_a_beginning_of_every_longer_text(
    case: tuple[Tokenizer, list[int]],
) -> None:
    """A piece depends on the tokens up to it alone, never on those to come."""
    tokenizer, ids = case
    detokenizer = Detokenizer(tokenizer)
    shown, whole = "", tokenizer.decode(ids)
    for id in ids:
        shown += detokenizer.push(id)
        assert whole.startswith(shown)


@given(SOME_TEXT, SOME_TEXT)
def test_prompt_and_answer_join_to_one_text(prompt: str, answer: str) -> None:
    """Byte-level text has no context, so the answer alone is what was encoded."""
    detokenizer = Detokenizer(BYTE_LEVEL, BYTE_LEVEL.encode(prompt))
    ids = BYTE_LEVEL.encode(answer)
    assert "".join(detokenizer.push(id) for id in ids) + detokenizer.flush() == answer
