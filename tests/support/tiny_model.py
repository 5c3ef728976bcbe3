"""A real model in miniature: seeded random weights, a byte-level tokenizer and a chat template.

Two layers of width 64 and a vocabulary of 300 tokens: a forward pass takes a millisecond, and the
directory is an ordinary one of safetensors, so that the model store takes it like any other.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2; the first is BOS and padding, the first and the last end a generation."""

EOS_TOKEN_IDS = (2, 0)

MAX_POSITIONS = 512

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_MERGES = (
    "t h|h e|i n|e r|a n|r e|o n|a t|e n|n d|o r|e s|i s|t e|a r|o u|i t|h a|e d|th e|in g|an d|"
    "Ġ t|Ġ a|Ġ s|Ġ w|Ġt h|Ġth e|Ġa nd|l l|Ġ o|Ġo f|. Ċ|ð Ł|ðŁ ĺ|Ã ©|â Ģ|âĢ Ļ|Ġ Ġ|Ċ Ċ|o o"
)
"""Pairs that the tokenizer joins: words, pieces of an emoji, and text with a stop string inside."""


def build_tiny_model(
    path: Path, *, architecture: str = "llama", seed: int = 0, **changes: Any
) -> Path:
    """Write a model of ``architecture`` (a ``model_type`` of transformers) into ``path``.

    ``changes`` go into its configuration. The same arguments give the same weights. Special tokens
    get logits near zero while the best of the others lies far above, so that greedy generation runs
    up to its limit. Returns ``path``.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            _config(architecture, tokenizer.get_vocab_size(), changes)
        )
        _spread_weights(model)
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=list(EOS_TOKEN_IDS), pad_token_id=0
    )
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(), indent=2))
    return path


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE: all 256 bytes, a few merges, three special tokens; 300 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in _MERGES.split("|"))]
    tokens = [*SPECIAL_TOKENS, *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def _config(architecture: str, vocab_size: int, changes: dict[str, Any]) -> PreTrainedConfig:
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": list(EOS_TOKEN_IDS),
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if architecture == "gpt2":
        sizes |= {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS}
        for name in ("num_key_value_heads", "head_dim", "intermediate_size"):
            del sizes[name]
    if architecture in ("mistral", "gemma2", "gemma3_text"):
        sizes["sliding_window"] = 24
    return CONFIG_MAPPING[architecture](**(sizes | changes))


def _spread_weights(model: PreTrainedModel) -> None:
    """Weights as drawn by default give almost equal logits; wider ones give clear choices."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.05)
    head = model.get_output_embeddings()
    assert head is not None
    with torch.no_grad():
        head.weight[: len(SPECIAL_TOKENS)] = 0.0


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
