"""The default model: in float32, greedy answers are those of transformers' own ``generate``, and in
bfloat16 no way to compute it is further from float32 than transformers is.
"""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from transformers import AutoModelForCausalLM

from common.models.chat_template import ChatTemplate
from common.models.store import StoredModel
from common.models.tokenizer import Tokenizer
from common.settings import WorkerSettings
from tests.support.engines import cache_for, ready_model, request, run_all, run_one
from tests.support.logits import NUM_SEQUENCES, compute_in_pieces, divergence
from tests.support.matching import matcher_of, schema_of
from tests.support.models import smollm2, smollm2_data_dir
from tests.support.native_kernels import are_runnable
from workers.engine.factory import build_engine
from workers.engine.port import Engine, EngineRequest
from workers.guided import Vocabulary

NUM_TOKENS = 24

QUESTIONS = (
    "What is a headrace?",
    "Name three rivers in Europe.",
    "Write a haiku about water wheels.",
    "How many legs has a spider?",
    "Explain queues to a child, please.",
    "Translate 'good morning' into French.",
    "What is 17 plus 25?",
    "Why is the sky blue? Answer in one sentence.",
    "List the first five prime numbers.",
    "Who wrote Don Quixote?",
)


@pytest.fixture(scope="module")
def stored() -> StoredModel:
    return smollm2()


@pytest.fixture(scope="module")
def tokenizer(stored: StoredModel) -> Tokenizer:
    return Tokenizer.load(stored.path)


@pytest.fixture(scope="module")
def prompts(stored: StoredModel, tokenizer: Tokenizer) -> list[list[int]]:
    template = ChatTemplate.load(stored.path)
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.encode(template.render(one), add_special_tokens=False) for one in messages]


@pytest.fixture(scope="module")
def generated(stored: StoredModel, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers answers to each prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(stored.path, dtype=torch.float32).eval()
    answers: list[list[int]] = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(  # pyright: ignore[reportAttributeAccessIssue] - wrongly annotated
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module")
def engine(stored: StoredModel) -> Engine:
    return build_engine(
        WorkerSettings(
            data_dir=smollm2_data_dir(), dtype="float32", max_batch_size=12, max_step_tokens=100
        )
    )


@pytest.mark.timeout(600)
def test_ten_prompts_alone(
    engine: Engine, prompts: list[list[int]], generated: list[list[int]], tokenizer: Tokenizer
) -> None:
    for prompt, expected in zip(prompts, generated, strict=True):
        got = run_one(engine, request("g", prompt, max_new_tokens=NUM_TOKENS))
        assert got.tokens == expected
        assert got.text == tokenizer.decode(expected)


@pytest.mark.timeout(600)
def test_ten_prompts_in_one_batch(
    engine: Engine, prompts: list[list[int]], generated: list[list[int]]
) -> None:
    """Their prompts are cut into chunks of a budget that none of them fits beside the others."""
    requests = [
        request(str(i), prompt, max_new_tokens=NUM_TOKENS) for i, prompt in enumerate(prompts)
    ]
    got = run_all(engine, requests)
    assert [got[str(i)].tokens for i in range(len(prompts))] == generated


@pytest.mark.timeout(600)
def test_a_sampled_answer_survives_a_handover(engine: Engine, prompts: list[list[int]]) -> None:
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 11}
    whole = run_one(engine, request("g", prompts[0], max_new_tokens=NUM_TOKENS, **sampling))
    for cut in (1, 9, 20):
        rest = run_one(
            engine,
            request(
                "g",
                prompts[0],
                logged=whole.tokens[:cut],
                max_new_tokens=NUM_TOKENS,
                **sampling,
            ),
        )
        assert (rest.tokens, rest.pieces) == (whole.tokens[cut:], whole.pieces[cut:])


SCHEMA = {
    "type": "object",
    "properties": {
        "animal": {"type": "string", "maxLength": 20},
        "legs": {"type": "integer", "minimum": 0, "maximum": 1000},
        "food": {"type": "array", "items": {"enum": ["grass", "meat", "Grütze"]}, "maxItems": 3},
    },
    "required": ["animal", "legs", "food"],
    "additionalProperties": False,
}


@pytest.mark.timeout(600)
def test_a_constrained_answer_survives_handovers_all_along(
    engine: Engine, stored: StoredModel, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    """Sampled; its log is cut behind every fifth token, and all go on in one crowded batch."""
    grammar = schema_of(SCHEMA)
    vocabulary = Vocabulary(tokenizer, engine.vocab_size, stored.manifest.eos_token_ids)

    def spec(logged: list[int]) -> EngineRequest:
        made = request(
            str(len(logged)),
            prompts[3],
            logged=logged,
            max_new_tokens=100,
            grammar=grammar,
            do_sample=True,
            temperature=1.2,
            seed=3,
        )
        matcher = matcher_of(grammar, vocabulary)
        return replace(made, matcher=matcher, cache_scope=f"behind {len(logged)}")

    whole = run_one(engine, spec([]))
    Draft202012Validator(SCHEMA).validate(json.loads(whole.text))
    cuts = range(0, len(whole.tokens), 5)
    assert len(cuts) >= 4
    free = request("free", prompts[1], max_new_tokens=NUM_TOKENS, do_sample=True)
    got = run_all(engine, [free, *(spec(whole.tokens[:cut]) for cut in cuts)])
    for cut in cuts:
        rest = got[str(cut)]
        assert (rest.tokens, rest.pieces) == (whole.tokens[cut:], whole.pieces[cut:])


@pytest.fixture(scope="module")
def sequences(prompts: list[list[int]], generated: list[list[int]]) -> torch.Tensor:
    """Questions with their answers, cut to one length."""
    whole = [prompt + answer for prompt, answer in zip(prompts, generated, strict=True)]
    length = min(map(len, whole[:NUM_SEQUENCES]))
    return torch.tensor([tokens[:length] for tokens in whole[:NUM_SEQUENCES]])


@pytest.fixture(scope="module")
def plain_logits(stored: StoredModel, sequences: torch.Tensor) -> dict[torch.dtype, torch.Tensor]:
    """What transformers computes in each type."""
    logits: dict[torch.dtype, torch.Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(stored.path, dtype=dtype).eval()
        with torch.inference_mode():
            logits[dtype] = model(input_ids=sequences).logits
    return logits


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["modules", *(["operations", "step"] if are_runnable() else [])])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(
    way: str,
    stored: StoredModel,
    sequences: torch.Tensor,
    plain_logits: dict[torch.dtype, torch.Tensor],
) -> None:
    exact = plain_logits[torch.float32]
    theirs = divergence(exact, plain_logits[torch.bfloat16])
    ready = ready_model(stored.path, way, torch.bfloat16)
    logits = compute_in_pieces(ready.bind(cache_for(ready, 4, torch.bfloat16)), sequences.tolist())
    assert divergence(exact, logits) <= 1.1 * theirs
