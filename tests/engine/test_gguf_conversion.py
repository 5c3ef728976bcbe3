"""GGUF in, an ordinary model out: the same numbers, the same tokens, the right end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from common.failures import Failure
from common.models.chat_template import ChatTemplate
from common.models.store import ModelStore, StoredModel
from common.models.tokenizer import Tokenizer
from tests.support.models import smollm2
from tests.support.tiny_model import CHAT_TEMPLATE, build_tiny_model

# The first test that needs the real model may have to download and convert it.
pytestmark = pytest.mark.timeout(600)

Edit = Callable[[gguf.GGUFWriter], None]

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}
HEADS, KEY_VALUE_HEADS = 4, 2


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture(scope="module")
def real() -> StoredModel:
    """SmolLM2-135M-Instruct, from the hub or converted from GGUF."""
    return smollm2()


def write_gguf(
    path: Path,
    original: Path,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre: str = "smollm",
    edit: Edit | None = None,
    leave_out: str | None = None,
) -> Path:
    """The tiny Llama as llama.cpp would store it."""
    config = json.loads((original / "config.json").read_bytes())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    add_tokenizer(writer, original, pre)
    if edit is not None:
        edit(writer)
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        if name == leave_out:
            continue
        add_tensor(writer, name, tensor.numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, original: Path, pre: str) -> None:
    content = json.loads((original / "tokenizer.json").read_bytes())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    special = {token["content"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    weights: np.ndarray[Any, Any],
    kind: gguf.GGMLQuantizationType,
) -> None:
    heads = {"q_proj": HEADS, "k_proj": KEY_VALUE_HEADS}.get(name.split(".")[-2])
    if heads is not None:  # llama.cpp interleaves the halves that rotary embedding pairs
        halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, weights.shape[1])
        weights = halves.swapaxes(1, 2).reshape(weights.shape)
    for theirs, llama_cpp in GGUF_NAMES.items():
        name = name.replace(theirs, llama_cpp)
    if weights.ndim == 1:
        kind = gguf.GGMLQuantizationType.F32
    data = gguf.quants.quantize(np.ascontiguousarray(weights), kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        (gguf.GGMLQuantizationType.F32, "float32", 0.0),
        (gguf.GGMLQuantizationType.F16, "float16", 1e-3),
        (gguf.GGMLQuantizationType.BF16, "bfloat16", 8e-3),
        (gguf.GGMLQuantizationType.Q8_0, "bfloat16", 2e-2),
    ],
)
def test_the_weights_come_back(
    tmp_path: Path,
    original: Path,
    kind: gguf.GGMLQuantizationType,
    dtype: str,
    tolerance: float,
) -> None:
    """Dense files keep their dtype and every bit; quantized ones lose no more than they had."""
    path = write_gguf(tmp_path / "tiny.gguf", original, kind=kind)
    store = ModelStore(tmp_path)
    manifest = store.add(str(path))
    assert manifest.dtype == dtype
    expected = weights_of(original)
    found = weights_of(store.get("tiny").path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).abs().max() / tensor.abs().max()
        assert error <= tolerance, name


def test_the_manifest_of_a_converted_model(tmp_path: Path, original: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", original)
    manifest = ModelStore(tmp_path).add(str(path))
    assert manifest.source == "gguf:tiny.gguf"
    assert manifest.revision.startswith("sha256:")
    assert manifest.licence == "mit"
    assert manifest.eos_token_ids == [2]
    assert manifest.max_position_embeddings == 512


def test_converting_twice_gives_the_same_version(tmp_path: Path, original: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", original, kind=gguf.GGMLQuantizationType.Q8_0)
    first = ModelStore(tmp_path / "first").add(str(path))
    second = ModelStore(tmp_path / "second").add(str(path))
    assert first.version == second.version


def test_a_known_file_is_not_converted_again(tmp_path: Path, original: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", original)
    store = ModelStore(tmp_path)
    manifest = store.add(str(path))
    seen: list[str] = []
    assert store.add(str(path), on_progress=lambda what, *_: seen.append(what)) == manifest
    assert seen == []


def test_tokenizer_and_template_are_those_of_the_file(tmp_path: Path, original: Path) -> None:
    """Apart from the digits, which the original tokenizer does not split."""
    path = write_gguf(tmp_path / "tiny.gguf", original, pre="gpt-2")
    store = ModelStore(tmp_path)
    store.add(str(path))
    model = store.get("tiny").path
    text = "<|im_start|>user\nthe  thing'll 12 é🙂\n\n end<|im_end|>\n"
    ids = Tokenizer.load(original).encode(text)
    assert Tokenizer.load(model).encode(text) == ids
    assert Tokenizer.load(model).special_ids == Tokenizer.load(original).special_ids
    assert ChatTemplate.load(model).source == CHAT_TEMPLATE
    assert AutoTokenizer.from_pretrained(model).encode(text) == ids


def test_every_token_that_may_end_an_answer_ends_it(tmp_path: Path, original: Path) -> None:
    """Llama 3 and others end a turn with another token than a text."""
    path = write_gguf(tmp_path / "t.gguf", original, edit=lambda writer: writer.add_eot_token_id(0))
    assert ModelStore(tmp_path).add(str(path)).eos_token_ids == [0, 2]


def test_text_split_in_an_unknown_way_is_refused(tmp_path: Path, original: Path) -> None:
    """Guessing would give other tokens than in training, and nobody would notice why."""
    path = write_gguf(tmp_path / "tiny.gguf", original, pre="from-the-future")
    with pytest.raises(Failure, match="from-the-future") as caught:
        ModelStore(tmp_path).add(str(path))
    assert caught.value.code == "MODEL_LOAD_FAILED"


def test_a_file_without_some_of_its_weights_is_refused(tmp_path: Path, original: Path) -> None:
    """transformers would fill the gap with random numbers."""
    missing = "model.layers.1.mlp.up_proj.weight"
    path = write_gguf(tmp_path / "tiny.gguf", original, leave_out=missing)
    with pytest.raises(Failure, match=missing) as caught:
        ModelStore(tmp_path).add(str(path))
    assert caught.value.code == "MODEL_LOAD_FAILED"


def test_converting_is_silent(
    tmp_path: Path, original: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The libraries' own progress bars would run through the one of the command line."""
    path = write_gguf(tmp_path / "tiny.gguf", original)
    capfd.readouterr()
    ModelStore(tmp_path).add(str(path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(40), b"not gguf at all" * 9])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(Failure, match=r"broken\.gguf") as caught:
        ModelStore(tmp_path).add(str(tmp_path / "broken.gguf"))
    assert caught.value.code == "MODEL_LOAD_FAILED"
    assert ModelStore(tmp_path).list() == []


def test_a_cut_off_file_is_refused(tmp_path: Path, original: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", original)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(Failure, match=r"tiny\.gguf"):
        ModelStore(tmp_path).add(str(path))


def test_the_real_model_is_what_it_says(real: StoredModel) -> None:
    real.verify()
    assert real.manifest.licence == "apache-2.0"
    assert real.manifest.architecture == "LlamaForCausalLM"
    assert real.manifest.dtype == "bfloat16"
    assert real.manifest.max_position_embeddings == 8192
    assert real.manifest.eos_token_ids == [2]


def test_the_real_tokenizer_knows_its_special_tokens(real: StoredModel) -> None:
    tokenizer = Tokenizer.load(real.path)
    assert tokenizer.encode("<|im_start|><|im_end|><|endoftext|>") == [1, 2, 0]
    assert {0, 1, 2} <= tokenizer.special_ids
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.vocab_size == 49152


def test_the_real_tokenizer_adds_nothing_at_the_ends(real: StoredModel) -> None:
    tokenizer = Tokenizer.load(real.path)
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("") == []


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  two spaces\n\n\nthree lines\n",
        "\ttabs\t\tand \r\n returns ",
        "emoji 🙂👩‍👩‍👧 and naïve café",
        "日本語とРусский",
        "def f(x):\n    return x ** 2  # 1234567890\n",
        "year  2024, 3.14159",
    ],
)
def test_the_real_tokenizer_gives_texts_back(real: StoredModel, text: str) -> None:
    tokenizer = Tokenizer.load(real.path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_real_tokenizer_splits_digits_as_in_training(real: StoredModel) -> None:
    """A run of spaces before a number is one token: the digits are split off before the spaces."""
    tokenizer = Tokenizer.load(real.path)
    texts = [tokenizer.token_text(token) for token in tokenizer.encode("in  2024")]
    assert texts == ["in", "  ", "2", "0", "2", "4"]


def test_the_real_tokenizer_equals_transformers(real: StoredModel) -> None:
    """What a client counts with transformers is what we count."""
    ours = Tokenizer.load(real.path)
    theirs = AutoTokenizer.from_pretrained(real.path)
    for text in ("It's 12:30 — fine.\n", "<|im_start|>user\nHi 🙂<|im_end|>\n", " a  b   c"):
        assert ours.encode(text) == theirs.encode(text)
    backend = Backend.from_file(str(real.path / "tokenizer.json"))
    assert backend.get_vocab_size() == ours.vocab_size


def test_the_real_template_adds_its_system_prompt(real: StoredModel) -> None:
    template = ChatTemplate.load(real.path)
    assert template.sha256 == real.manifest.chat_template_sha256
    hello = [{"role": "user", "content": "Hi"}]
    assert template.render(hello) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}, *hello]
    assert template.render(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    theirs = AutoTokenizer.from_pretrained(real.path)
    for messages in (hello, own, [*own, {"role": "assistant", "content": "Hello."}, *hello]):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template.render(messages) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_model_knows_the_capital_of_france(real: StoredModel, dtype: torch.dtype) -> None:
    """Weights, tokenizer, template and end token fit together, in both dtypes."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(real.path, dtype=dtype)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied, as in the original"
    tokenizer = Tokenizer.load(real.path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode(ChatTemplate.load(real.path).render(question))
    generate = cast("Callable[..., torch.Tensor]", model.generate)  # pyright: ignore[reportAttributeAccessIssue]
    output = generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
    answer = output[0, len(prompt) :].tolist()
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] in real.manifest.eos_token_ids
