"""The tokenizer wrapper: ids and back, special tokens, byte offsets, and what it must not need."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import Unigram

from common.failures import Failure
from common.models.tokenizer import Tokenizer
from tests.support.models import ROOT, simulated

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated(tmp_path_factory.mktemp("data")).path


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


def edited(path: Path, into: Path, file: str, **changes: object) -> Path:
    """A copy of the model with some keys of one JSON file changed."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((path / name).read_bytes())
        content |= changes if name == file else {}
        (into / name).write_text(json.dumps(content))
    return into


@given(text=TEXTS)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(text=TEXTS.filter(lambda text: "<|" not in text))
def test_offsets_cover_the_text_in_bytes(tokenizer: Tokenizer, text: str) -> None:
    """Each token's text is what lies between its offsets in UTF-8, and nothing is left out."""
    raw = text.encode()
    covered: set[int] = set()
    for _, piece, start, stop in tokenizer.encode_with_offsets(text):
        assert raw[start:stop].decode() == piece
        covered.update(range(start, stop))
    assert covered == set(range(len(raw)))


@given(text=TEXTS)
def test_the_bytes_of_the_tokens_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    """Each alone, though most tokens of this model are no character by themselves."""
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_a_token_keeps_the_space_that_a_text_would_lose() -> None:
    """As SentencePiece writes it; a token for one raw byte is that byte."""
    vocab = {"<unk>": 0, "\u2581the": 1, "the": 2, "<0xE2>": 3}
    backend = Backend(Unigram([(piece, -1.0) for piece in vocab], 0, byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer = Tokenizer(backend, {})
    assert tokenizer.token_text(1) == "the"
    assert [tokenizer.token_bytes(id) for id in (1, 2, 3, 99)] == [b" the", b"the", b"\xe2", b""]


def test_tokens_of_one_character_each_cover_it(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_with_offsets("aé🙂") == [
        (ord("a"), "a", 0, 1),
        (0xC3, "é", 1, 3),
        (0xA9, "é", 1, 3),
        *((byte, "🙂", 3, 7) for byte in "🙂".encode()),
    ]


def test_special_tokens_are_single_ids_that_decoding_leaves_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    assert ids[0] in tokenizer.special_ids
    assert ids[-1] in tokenizer.special_ids
    assert len(ids) == len("user\nhi") + 2
    assert tokenizer.decode(ids) == "user\nhi"
    assert tokenizer.token_text(ids[-1]) == "<|im_end|>"


def test_names_of_the_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.vocab_size == 259


def test_unknown_ids_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(100_000) == ""


def test_a_lone_surrogate_is_the_callers_fault(tokenizer: Tokenizer) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(Failure) as caught:
            encode("a\ud800")
        assert caught.value.code == "BAD_REQUEST"


async def test_a_long_text_leaves_the_event_loop_free(tokenizer: Tokenizer) -> None:
    """Other tasks go on while megabytes are encoded, offsets included."""
    text = "the quick brown fox " * 15_000
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    async with asyncio.TaskGroup() as group:
        ticker = group.create_task(tick())
        ids = await tokenizer.encode_async(text)
        ticks_while_encoding, ticks = ticks, 0
        tokens = await tokenizer.encode_with_offsets_async(text)
        ticker.cancel()
    assert len(ids) == len(tokens) == len(text)
    assert ticks_while_encoding >= 5
    assert ticks >= 5


async def test_short_and_long_texts_encode_alike(tokenizer: Tokenizer) -> None:
    for text in ("short 🙂", "long 🙂 " * 5000):
        assert await tokenizer.encode_async(text) == tokenizer.encode(text)
        with_offsets = await tokenizer.encode_with_offsets_async(text)
        assert with_offsets == tokenizer.encode_with_offsets(text)


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ({}, [104, 105]),
        ({"add_bos_token": True}, [257, 104, 105]),
        ({"add_eos_token": True}, [104, 105, 258]),
        ({"add_bos_token": True, "add_eos_token": True}, [257, 104, 105, 258]),
        ({"add_bos_token": False}, [104, 105]),
    ],
)
def test_the_configuration_decides_what_is_added_at_the_ends(
    path: Path, tmp_path: Path, config: dict[str, bool], ids: list[int]
) -> None:
    changed = edited(path, tmp_path, "tokenizer_config.json", bos_token="<|im_start|>", **config)
    tokenizer = Tokenizer.load(changed)
    assert tokenizer.encode("hi") == ids
    assert tokenizer.encode("hi", add_special_tokens=False) == [104, 105]


def test_padding_and_truncation_saved_in_the_file_are_ignored(path: Path, tmp_path: Path) -> None:
    """A tokenizer saved after training often cuts every text at some length."""
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 256,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    truncation = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    changed = edited(path, tmp_path, "tokenizer.json", padding=padding, truncation=truncation)
    tokenizer = Tokenizer.load(changed)
    assert len(tokenizer.encode("hi")) == 2
    assert len(tokenizer.encode("hello there")) == 11


def test_a_token_that_the_configuration_names_is_special(path: Path, tmp_path: Path) -> None:
    """Some files list the end token as plain text; the configuration outranks them."""
    content = json.loads((path / "tokenizer.json").read_bytes())
    plain = [{**token, "special": False} for token in content["added_tokens"]]
    changed = edited(path, tmp_path, "tokenizer.json", added_tokens=plain)
    (changed / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "a"}}))
    assert ord("a") in Tokenizer.load(changed).special_ids


def test_a_broken_file_is_named(path: Path, tmp_path: Path) -> None:
    changed = edited(path, tmp_path, "tokenizer.json", model={"type": "Nonsense"})
    with pytest.raises(Failure, match=r"tokenizer\.json cannot be read") as caught:
        Tokenizer.load(changed)
    assert caught.value.code == "MODEL_LOAD_FAILED"


def test_a_gateway_needs_neither_torch_nor_transformers(path: Path) -> None:
    """All that a gateway does with a model works where torch is not installed."""
    script = """
import sys

for heavy in ("torch", "transformers", "numpy", "safetensors", "gguf"):
    sys.modules[heavy] = None

from pathlib import Path

from common.models.chat_template import ChatTemplate
from common.models.store import ModelStore
from common.models.tokenizer import Tokenizer

path = Path(sys.argv[1])
model = ModelStore(path.parents[1]).get(path.name)
model.verify()
prompt = ChatTemplate.load(model.path).render([{"role": "user", "content": "hi"}])
print(len(Tokenizer.load(model.path).encode(prompt)))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr == ""
    assert int(result.stdout) > 10
