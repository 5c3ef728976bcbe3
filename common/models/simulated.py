"""A model directory without weights: a byte-level tokenizer, a chat template and a configuration.

With it a gateway and the simulated engine run without downloading anything. Its bytes, and so its
version, are the same on every machine.
"""

from common.models.byte_level import byte_symbols
from common.models.files import TOKENIZER_FILE, JsonObject, to_json

SIMULATED_MODEL = "simulated"

MAX_POSITIONS = 32_768

END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
"""Token ids 256, 257 and 258; ids 0 to 255 are the bytes themselves."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SCRIPT = (
    "A river above the mill is led into a channel.",
    "The channel keeps its level while the valley falls away.",
    "Where it ends, the water has somewhere to fall, and the wheel begins to turn.",
    "Nobody upstream needs to know which wheel that is.",
    "If one wheel stands still, the sluice beside it opens and another takes the flow.",
    "What was ground stays ground; the stones go on with the next grain.",
    "In dry weeks the miller counts the hours and lets the small orders through first.",
    "In spring he opens the spillway early, before the bank is tried.",
    "Children sail bark boats from the weir and meet them again below the bridge. 🛶",
    "The café by the lock serves crêpes, and nobody there is in a hurry.",
    "An old ledger notes each sack, who brought it, and when it was fetched.",
    "So even after the great flood every farmer got his own flour back.",
)
"""Sentences that a simulated engine strings together, for each generation in another order. They
are part of this model, so that its version changes with them."""


def simulated_files() -> dict[str, bytes]:
    """The content of each file of the model, by name."""
    eos_token_id = 256 + _SPECIAL_TOKENS.index(MESSAGE_END)
    config: JsonObject = {
        "architectures": ["simulated"],
        "model_type": "simulated",
        "max_position_embeddings": MAX_POSITIONS,
        "vocab_size": 256 + len(_SPECIAL_TOKENS),
        "eos_token_id": eos_token_id,
        "script": list(SCRIPT),
    }
    contents = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": eos_token_id},
        TOKENIZER_FILE: _tokenizer(),
        "tokenizer_config.json": _tokenizer_config(),
    }
    return {name: to_json(content) for name, content in contents.items()}


def _tokenizer() -> JsonObject:
    """The content of a ``tokenizer.json`` that makes one token of each byte of UTF-8."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    specials = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 256 + index, "content": text, "special": True, **specials}
            for index, text in enumerate(_SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "trim_offsets": False},
        "post_processor": None,
        "decoder": {**byte_level, "trim_offsets": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {symbol: byte for byte, symbol in enumerate(byte_symbols())},
            "merges": [],
        },
    }


def _tokenizer_config() -> JsonObject:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": MESSAGE_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


_SPECIAL_TOKENS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END)
