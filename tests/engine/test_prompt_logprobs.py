"""What a prompt's own tokens were worth to the model, told with the first tokens of the answer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.messages import Finish, PromptLogprobs
from common.models.tokenizer import Tokenizer
from tests.support.engines import is_busy, request, tiny_engine, tiny_paged_engine
from workers.engine.batching import BatchingEngine
from workers.engine.port import EngineRequest, StepOutput
from workers.engine.scheduler import SPARE_ROWS, Limits

TEXT = "and the water falls on and on, longer than any chunk. " * 4


@pytest.fixture
def prompt(tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.encode(TEXT)
    assert len(ids) > SPARE_ROWS
    return ids


@pytest.fixture
def expected(tiny_model: Path, prompt: list[int]) -> torch.Tensor:
    """``[len(prompt), vocabulary]``: log-probabilities behind each token, as transformers says."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0].log_softmax(-1)


def outputs_of(engine: BatchingEngine, *requests: EngineRequest) -> dict[str, list[StepOutput]]:
    outputs: dict[str, list[StepOutput]] = {one.id: [] for one in requests}
    for one in requests:
        engine.submit(one)
    while is_busy(engine):
        for output in engine.step():
            outputs[output.id].append(output)
    return outputs


def asking(id: str, prompt: list[int], **sampling: Any) -> EngineRequest:
    asked: dict[str, Any] = {"prompt_logprobs": True, "max_new_tokens": 3}
    return request(id, prompt, **(asked | sampling))


def check(told: PromptLogprobs | None, prompt: list[int], expected: torch.Tensor) -> None:
    assert told is not None
    assert len(told.logprobs) == len(prompt)
    assert told.logprobs[0] is None
    wanted = expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    assert told.logprobs[1:] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("step_tokens", [1, 7, 256])
@pytest.mark.parametrize("build", [tiny_engine, tiny_paged_engine])
def test_they_are_those_of_transformers(
    tiny_model: Path, prompt: list[int], expected: torch.Tensor, step_tokens: int, build: Any
) -> None:
    """However the prompt is cut, and whoever else is in the step; they come once, at the start."""
    limits = Limits(max_sequences=4, cache_tokens=2048, step_tokens=step_tokens)
    got = outputs_of(
        build(tiny_model, limits),
        request("before", prompt[:5], max_new_tokens=20),
        asking("a", prompt),
        asking("b", prompt[:-2]),
    )
    check(got["a"][0].prompt, prompt, expected)
    check(got["b"][0].prompt, prompt[:-2], expected[:-2])
    assert got["a"][0].prompt is not None
    assert got["a"][0].prompt.tops is None
    assert [output.prompt for output in got["a"][1:]] == [None] * (len(got["a"]) - 1)


def test_the_likeliest_instead_of_each_are_told_too(
    tiny_model: Path, prompt: list[int], expected: torch.Tensor
) -> None:
    got = outputs_of(tiny_engine(tiny_model), asking("a", prompt, top_logprobs=3))["a"][0].prompt
    assert got is not None
    assert got.tops is not None
    assert got.tops[0] is None
    best = expected[:-1].topk(3)
    for top, ids, values in zip(got.tops[1:], best.indices, best.values, strict=True):
        assert top is not None
        assert [id for id, _ in top] == ids.tolist()
        assert [logprob for _, logprob in top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("length", [1, 30])
def test_a_prompt_can_be_asked_about_without_an_answer(
    tiny_model: Path, prompt: list[int], expected: torch.Tensor, length: int
) -> None:
    """As evaluation harnesses do: they only compare how likely given texts are."""
    asked = asking("a", prompt[:length], max_new_tokens=0)
    (output,) = outputs_of(tiny_engine(tiny_model), asked)["a"]
    assert (output.tokens, output.finish) == ([], Finish("length"))
    check(output.prompt, prompt[:length], expected[:length])


def test_a_prefix_that_lies_there_is_computed_again(
    tiny_model: Path, prompt: list[int], expected: torch.Tensor
) -> None:
    """Its logits are needed; what comes out serves others as ever."""
    engine = tiny_engine(tiny_model)
    outputs_of(engine, request("first", prompt))
    (asked, *_) = outputs_of(engine, asking("asked", prompt))["asked"]
    check(asked.prompt, prompt, expected)
    assert asked.cached_tokens == 0
    (later, *_) = outputs_of(engine, request("later", prompt))["later"]
    assert later.cached_tokens > len(prompt) - 16


def test_they_are_told_once_though_an_attempt_is_put_back(
    tiny_model: Path, prompt: list[int], expected: torch.Tensor
) -> None:
    """Behind a log that has begun, they have been told by the attempt before."""
    engine = tiny_engine(tiny_model)
    one = asking("a", prompt)
    begun = EngineRequest("a", one.prompt, one.sampling, [70])
    assert [output.prompt for output in outputs_of(engine, begun)["a"]] == [None, None]
    tight = Limits(max_sequences=3, cache_tokens=len(prompt) * 2 + 10, step_tokens=64)
    got = outputs_of(
        tiny_engine(tiny_model, tight),
        request("old", prompt[:-3], max_new_tokens=30),
        asking("a", prompt, max_new_tokens=20),
    )["a"]
    check(got[0].prompt, prompt, expected)
    assert all(output.prompt is None for output in got[1:])
    assert sum(len(output.tokens) for output in got) == 20
