"""Any decoder of transformers runs as it is, and answers exactly as its own ``generate`` does."""

from pathlib import Path

import pytest

from common.failures import Failure
from common.models.tokenizer import Tokenizer
from tests.support.engines import ROOMY, request, run_all, run_one, tiny_engine, tiny_runner
from tests.support.greedy import PROMPTS, generate
from tests.support.tiny_model import build_tiny_model
from workers.engine.scheduler import Limits

RUNNING = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gpt2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "opt",
    "stablelm",
    "mixtral",
    "gpt_neox",
    "olmo2",
    "cohere2",
    "granite",
]
"""Plain ones; sliding windows, soft caps, learnt positions, experts; and a model (stablelm) that
hands nothing on to its attention."""

REFUSED = {
    "bloom": "off by",
    "mamba": "linear_attention",
    "gpt_oss": "sinks",
    "llama4_text": "chunked_attention",
}
"""Attention of their own, state beside attention, or masks that cannot be seen from outside."""


@pytest.mark.parametrize("architecture", RUNNING)
def test_greedy_equals_generate(architecture: str, tmp_path: Path) -> None:
    """Alone, in a mixed batch, and with prompts cut into chunks between the others' tokens."""
    path = build_tiny_model(tmp_path, architecture=architecture)
    tokenizer = Tokenizer.load(path)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    expected = [generate(path, prompt, 32) for prompt in prompts]
    requests = [request(str(i), prompt, max_new_tokens=32 - i) for i, prompt in enumerate(prompts)]
    engine = tiny_engine(path)
    alone = [run_one(engine, one).tokens for one in requests]
    batched = run_all(engine, requests)
    chunked = run_all(
        tiny_engine(path, Limits(max_sequences=3, cache_tokens=1024, step_tokens=7)), requests
    )
    for i, whole in enumerate(expected):
        assert alone[i] == batched[str(i)].tokens == chunked[str(i)].tokens == whole[: 32 - i]


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_would_run_wrongly_is_refused_at_load(architecture: str, tmp_path: Path) -> None:
    """Never a wrong answer in silence: the start fails and says why."""
    path = build_tiny_model(tmp_path, architecture=architecture)
    with pytest.raises(Failure, match=REFUSED[architecture]) as caught:
        tiny_runner(path, ROOMY)
    assert caught.value.code == "MODEL_LOAD_FAILED"
