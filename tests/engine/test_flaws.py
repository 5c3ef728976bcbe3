"""An answer that is no text, a circle or not of its grammar is flagged; whatever else is is not."""

import shutil
from collections.abc import Sequence as Ids
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.messages import Grammar, Sampling
from common.models.tokenizer import Tokenizer
from tests.support.engines import request, run_one, tiny_engine
from tests.support.grammars import Residues
from tests.support.tiny_model import EOS_TOKEN_IDS
from workers.engine.flaws import find_cycle, has_invalid_bytes
from workers.engine.port import EngineRequest
from workers.engine.sequence import Sequence, TextRules

CIRCLE = "zqkv "
FORCE = 100.0


@pytest.fixture(scope="module")
def circling(tiny_model: Path, tokenizer: Tokenizer, tmp_path_factory: Any) -> Path:
    """A model whose weights only know which letter of the circle comes behind which."""
    path = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("circling") / "llama"))
    weights = load_file(path / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"].zero_()
    ids = tokenizer.encode(CIRCLE)
    for before, after in zip(ids, [*ids[1:], ids[0]], strict=True):
        head[after] = embedding[before] / torch.linalg.vector_norm(embedding[before])
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def flaw_of(path: Path, prompt: Ids[int], logged: Ids[int] = (), **sampling: Any) -> str:
    asked = request("g", list(prompt), logged=list(logged), **sampling)
    finish = run_one(tiny_engine(path), asked).finish
    assert finish is not None
    assert finish.reason == "length"
    return finish.flagged


def test_a_circle_that_only_the_limit_ends_is_flagged(circling: Path, tokenizer: Tokenizer) -> None:
    """Also in JSON, where white space without end is what models fall into."""
    prompt = tokenizer.encode("Once z")
    assert flaw_of(circling, prompt, max_new_tokens=100) == "repetition"
    logged = run_one(tiny_engine(circling), request("g", prompt, max_new_tokens=90)).tokens
    assert flaw_of(circling, prompt, max_new_tokens=100, logged=logged) == "repetition"


@pytest.mark.parametrize(
    ("prompt", "sampling"),
    [
        ("Once z", {"max_new_tokens": 40}),
        ("Once z", {"ignore_eos": True}),
        ("Once z", {"min_new_tokens": 99}),
        ("Say zqkv zqkv all day: z", {}),
        ("Say: kv zq! And: z", {}),
        ("Once z", {"logit_bias": {70: 0.5}}),
    ],
)
def test_a_circle_that_was_asked_for_or_is_short_is_not(
    circling: Path, tokenizer: Tokenizer, prompt: str, sampling: dict[str, Any]
) -> None:
    told: dict[str, Any] = {"max_new_tokens": 100} | sampling
    expected = "repetition" if "!" in prompt else ""
    assert flaw_of(circling, tokenizer.encode(prompt), **told) == expected


def test_bytes_that_are_no_characters_are_flagged(tiny_model: Path, tokenizer: Tokenizer) -> None:
    """But not the first byte of one that the limit cut in two."""
    [first, _] = byte_ids(tokenizer, "ß")
    prompt = tokenizer.encode("a")
    bias = {first: FORCE}
    assert flaw_of(tiny_model, prompt, max_new_tokens=1, logit_bias=bias) == ""
    assert flaw_of(tiny_model, prompt, max_new_tokens=2, logit_bias=bias) == "invalid_utf8"


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text)
    assert [tokenizer.token_bytes(id) for id in ids] == [bytes([it]) for it in text.encode()]
    return ids


def ended(tokenizer: Tokenizer, text: str, *, eos: bool = True, **sampling: Any) -> Sequence:
    """A generation that said ``text``, whatever model would."""
    rules = TextRules(tokenizer, frozenset(EOS_TOKEN_IDS))
    most = 1000 if eos else len(tokenizer.encode(text))
    told: dict[str, Any] = {"max_new_tokens": most} | sampling
    sequence = Sequence(request("g", tokenizer.encode("Go on: "), **told), rules)
    for token in [*tokenizer.encode(text), *EOS_TOKEN_IDS[:eos]]:
        sequence.append(token)
    assert sequence.finish is not None
    return sequence


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ok",
        "Good \ufffd, said the page.",
        "Smile 👍🛶, naïve café.",
        "la la la la la, " * 3 + "and so on.",
        "| --- | --- |\n" * 3,
    ],
)
@pytest.mark.parametrize("eos", [True, False])
def test_ordinary_text_is_not_flagged(tokenizer: Tokenizer, text: str, *, eos: bool) -> None:
    """A character that says that others were unreadable is one like any other."""
    if text or eos:
        assert ended(tokenizer, text, eos=eos).flaw() == ""


def test_half_a_character_before_an_end_of_its_own_is_flagged(tokenizer: Tokenizer) -> None:
    rules = TextRules(tokenizer, frozenset(EOS_TOKEN_IDS))
    sequence = Sequence(request("g", [70]), rules)
    for token in (byte_ids(tokenizer, "ß")[0], EOS_TOKEN_IDS[0]):
        sequence.append(token)
    assert sequence.flaw() == "invalid_utf8"


@pytest.mark.parametrize(("length", "flaw"), [(2, ""), (3, "grammar")])
def test_an_end_that_the_grammar_forbids_is_flagged(
    tokenizer: Tokenizer, length: int, flaw: str
) -> None:
    """As a sampler that does not heed the mask would choose it."""
    sampling = Sampling(9, 0, grammar=Grammar("regex", "x"))
    asked = EngineRequest("g", [70], sampling, matcher=Residues(length))
    sequence = Sequence(asked, TextRules(tokenizer, frozenset(EOS_TOKEN_IDS)))
    for token in (70, 71, EOS_TOKEN_IDS[0]):
        sequence.append(token)
    assert sequence.flaw() == flaw


def test_what_a_cycle_is() -> None:
    assert list(find_cycle([1, 2, 3] + [7, 8] * 32)) == [7, 8]
    assert list(find_cycle([5] * 64)) == [5]
    assert list(find_cycle([5] * 63)) == []
    assert list(find_cycle([5] * 100 + [6])) == []
    sentence = list(range(30))
    assert list(find_cycle(sentence * 4)) == sentence
    assert list(find_cycle(sentence[15:] + sentence * 3)) == []
    assert list(find_cycle(list(range(33)) * 9)) == []


def test_only_the_end_may_be_cut() -> None:
    assert not has_invalid_bytes("a👍".encode()[:-1], is_cut=True)
    assert has_invalid_bytes("a👍".encode()[:-1], is_cut=False)
    assert has_invalid_bytes("👍".encode()[:-1] + b"a", is_cut=True)
    assert not has_invalid_bytes("👍".encode(), is_cut=False)
