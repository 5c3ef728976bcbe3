"""In float32 every parameter gives the same answer alone, in a crowd, guessed, and handed over.

The engines under test speculate as much as they can: their clock stands still, so that a guess
never seems to cost anything. What they are compared with does not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

from common.messages import Grammar, TopTokens, Watermark
from common.models.tokenizer import Tokenizer
from tests.support.engines import (
    Transcript,
    engine_around,
    is_busy,
    request,
    tiny_paged,
    tiny_runner,
)
from tests.support.grammars import Residues
from tests.support.matching import matcher_of
from tests.support.tiny_model import EOS_TOKEN_IDS
from workers.engine.batching import BatchingEngine, Launcher, Runner
from workers.engine.grammar import Matcher
from workers.engine.lookup import MAX_DRAFT_TOKENS
from workers.engine.places import PagePlaces
from workers.engine.port import EngineRequest, StepOutput
from workers.engine.scheduler import Limits
from workers.model.paged_model import PAGE_TOKENS
from workers.model.paged_runner import PagedRunner

LENGTH = 30
SAMPLED: dict[str, Any] = {"do_sample": True, "seed": 7, "top_logprobs": 2}
FEW = {"logit_bias": dict.fromkeys((70, 71, 72, 73), 6.0)}
"""An answer of few different tokens says much again: guesses are right now and then."""

RESIDUES = Grammar("regex", "as the class of that name says")

FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {"top_logprobs": 2},
    "temperature": SAMPLED | {"temperature": 0.7},
    "top_k": SAMPLED | {"top_k": 3},
    "top_p": SAMPLED | {"top_p": 0.6},
    "min_p": SAMPLED | {"min_p": 0.1},
    "typical_p": SAMPLED | {"typical_p": 0.5},
    "repetition_penalty": SAMPLED | {"repetition_penalty": 1.4},
    "frequency_penalty": SAMPLED | {"frequency_penalty": 0.8},
    "presence_penalty": SAMPLED | {"presence_penalty": 0.8},
    "relative_frequency_penalty": SAMPLED | {"relative_frequency_penalty": 2.0},
    "bias": SAMPLED | FEW,
    "bias_and_penalties": SAMPLED | FEW | {"frequency_penalty": 0.2, "repetition_penalty": 1.1},
    "watermark": SAMPLED | {"watermark": Watermark(gamma=0.5, delta=2.0)},
    "watermark_of_few": SAMPLED | FEW | {"watermark": Watermark(gamma=0.25, delta=2.0)},
    "min_new_tokens": SAMPLED | {"min_new_tokens": 12, "logit_bias": {EOS_TOKEN_IDS[0]: 8.0}},
    "stop_tokens": SAMPLED | FEW | {"min_new_tokens": 20, "stop_token_ids": (71, 90)},
    "stop": SAMPLED | FEW | {"stop": ("eeg", "ggd"), "min_new_tokens": 9},
    "grammar": SAMPLED | {"grammar": RESIDUES},
    "grammar_greedy": {"grammar": RESIDUES, "top_logprobs": 1},
    "regex": SAMPLED | {"grammar": Grammar("regex", "[ab]{2}(-[ab]{2}){8,}")},
    "json_schema": SAMPLED
    | {"grammar": Grammar("json_schema", '{"enum": ["so it is, so it was"]}')},
    "grammar_of_few": SAMPLED | FEW | {"grammar": RESIDUES},
}


@dataclass
class Answer(Transcript):
    """All that is told about an answer."""

    tops: list[TopTokens] = field(default_factory=list[TopTokens])


@pytest.fixture(scope="module")
def requests(tokenizer: Tokenizer) -> dict[str, EngineRequest]:
    """By feature; every prompt has something in it that may be said again."""
    prompts = [tokenizer.encode(text) for text in ("The mill, the miller, the mill", "gh gh gh g")]
    return {
        name: request(name, prompts[number % 2], max_new_tokens=LENGTH, **sampling)
        for number, (name, sampling) in enumerate(FEATURES.items())
    }


@pytest.fixture(scope="module")
def expected(tiny_model: Path, requests: dict[str, EngineRequest]) -> dict[str, Answer]:
    """Each alone, a token per step."""
    engine = slot_engine(tiny_model, Limits(8, 4096, 256))
    return {name: answers(engine, [one])[name] for name, one in requests.items()}


def slot_engine(path: Path, limits: Limits) -> BatchingEngine:
    return _engine(path, limits, tiny_runner(path, limits))


def paged_engine(path: Path, limits: Limits, *, foresees: bool = False) -> BatchingEngine:
    ready = tiny_paged(path, limits)
    places = PagePlaces(ready.num_pages, page_tokens=PAGE_TOKENS, max_sequences=limits.num_slots)
    runner = PagedRunner(ready.forward)
    return _engine(path, limits, runner, places, runner if foresees else None)


def foreseeing_engine(path: Path, limits: Limits) -> BatchingEngine:
    """As on CUDA: each step is launched before the tokens of the last one are known."""
    return paged_engine(path, limits, foresees=True)


def _engine(
    path: Path,
    limits: Limits,
    runner: Runner,
    places: PagePlaces | None = None,
    launcher: Launcher | None = None,
) -> BatchingEngine:
    tokenizer = Tokenizer.load(path)
    return engine_around(
        runner, tokenizer, limits, places=places, launcher=launcher, clock=lambda: 0.0
    )


def answers(
    engine: BatchingEngine, requests: list[EngineRequest], num_running: list[int] | None = None
) -> dict[str, Answer]:
    """What all of them get, computed together; a grammar starts anew with each."""
    got: dict[str, Answer] = {one.id: Answer() for one in requests}
    for one in requests:
        engine.submit(replace(one, matcher=_matcher(one.sampling.grammar)))
    while is_busy(engine):
        outputs = engine.step()
        for output in outputs:
            add(got[output.id], output)
        if num_running is not None:
            num_running.append(engine.load().running)
            num_running[-1] += sum(output.finish is not None for output in outputs)
    return got


def add(answer: Answer, output: StepOutput) -> None:
    answer.tokens += output.tokens
    answer.pieces += output.pieces
    answer.logprobs += output.logprobs
    answer.tops += output.tops or []
    answer.finish = output.finish


def _matcher(grammar: Grammar | None) -> Matcher | None:
    if grammar is None:
        return None
    return Residues() if grammar == RESIDUES else matcher_of(grammar)


def assert_same(got: Answer, expected: Answer, start: int = 0) -> None:
    """The rest of ``expected`` from ``start`` on."""
    assert got.tokens == expected.tokens[start:]
    assert got.pieces == expected.pieces[start:]
    assert got.finish == expected.finish
    assert got.logprobs == pytest.approx(expected.logprobs[start:], abs=1e-4)
    for ours, theirs in zip(got.tops, expected.tops[start:], strict=True):
        assert [id for id, _ in ours] == [id for id, _ in theirs]
        assert [x for _, x in ours] == pytest.approx([x for _, x in theirs], abs=1e-4)


def test_every_feature_makes_a_difference(expected: dict[str, Answer]) -> None:
    """Guards the tests below against proving little."""
    names = {tuple(answer.tokens): name for name, answer in expected.items()}
    assert set(names.values()) == expected.keys()
    reasons = {name: answer.finish.reason for name, answer in expected.items() if answer.finish}
    assert reasons["min_new_tokens"] == "eos_token"
    assert reasons["stop_tokens"] == reasons["stop"] == "stop_sequence"
    assert reasons["grammar"] == reasons["watermark"] == "length"
    assert all(len(answer.tokens) > 10 for answer in expected.values())


@pytest.mark.parametrize("name", FEATURES)
def test_guessing_changes_nothing(
    tiny_model: Path,
    requests: dict[str, EngineRequest],
    expected: dict[str, Answer],
    speculating: BatchingEngine,
    name: str,
) -> None:
    assert_same(answers(speculating, [requests[name]])[name], expected[name])


@pytest.fixture(scope="module")
def speculating(tiny_model: Path) -> BatchingEngine:
    return slot_engine(tiny_model, Limits(16, 4096, 256, MAX_DRAFT_TOKENS))


def test_guesses_are_right_now_and_then(
    speculating: BatchingEngine, requests: dict[str, EngineRequest]
) -> None:
    """Guards the test above."""
    for name in ("bias", "bias_and_penalties", "watermark_of_few", "grammar_of_few", "regex"):
        num_running: list[int] = []
        (answer,) = answers(speculating, [requests[name]], num_running).values()
        assert len(num_running) < len(answer.tokens), name


@pytest.mark.parametrize("name", FEATURES)
def test_not_waiting_for_the_last_token_changes_nothing(
    requests: dict[str, EngineRequest],
    expected: dict[str, Answer],
    foreseeing: BatchingEngine,
    name: str,
) -> None:
    """Penalties, masks and marks need to know the last token, but only when the next is chosen."""
    one = requests[name]
    foreseeing.submit(replace(one, matcher=_matcher(one.sampling.grammar)))
    got = Answer()
    for number in count(1):
        for output in foreseeing.step():
            add(got, output)
        if not is_busy(foreseeing):
            break
        assert foreseeing._under_way is not None or number == len(expected[name].tokens) - 1
    assert_same(got, expected[name])


@pytest.fixture(scope="module")
def foreseeing(tiny_model: Path) -> BatchingEngine:
    return foreseeing_engine(tiny_model, Limits(16, 4096, 256))


@pytest.mark.parametrize("build", [slot_engine, paged_engine, foreseeing_engine])
@pytest.mark.parametrize("draft_tokens", [0, MAX_DRAFT_TOKENS])
def test_a_crowd_changes_nothing(
    tiny_model: Path,
    requests: dict[str, EngineRequest],
    expected: dict[str, Answer],
    build: Callable[[Path, Limits], BatchingEngine],
    draft_tokens: int,
) -> None:
    """Everybody at once, each with other parameters."""
    got = answers(build(tiny_model, Limits(8, 4096, 64, draft_tokens)), list(requests.values()))
    for name, answer in got.items():
        assert_same(answer, expected[name])


@pytest.mark.parametrize("build", [slot_engine, paged_engine, foreseeing_engine])
def test_being_put_back_changes_nothing(
    tiny_model: Path,
    requests: dict[str, EngineRequest],
    expected: dict[str, Answer],
    build: Callable[[Path, Limits], BatchingEngine],
) -> None:
    """The cache is too small for all who run; the youngest is put back and computed again."""
    engine = build(tiny_model, Limits(6, 320, 64, MAX_DRAFT_TOKENS))
    num_running: list[int] = []
    got = answers(engine, list(requests.values()), num_running)
    assert any(later < before for before, later in pairwise(num_running))
    for name, answer in got.items():
        assert_same(answer, expected[name])


@pytest.mark.parametrize("build", [slot_engine, paged_engine, foreseeing_engine])
def test_giving_way_changes_nothing(
    tiny_model: Path,
    requests: dict[str, EngineRequest],
    expected: dict[str, Answer],
    build: Callable[[Path, Limits], BatchingEngine],
) -> None:
    """Most pause at every possible place, some of them put back meanwhile."""
    engine = build(tiny_model, Limits(6, 420, 48, MAX_DRAFT_TOKENS, spare_sequences=4))
    got: dict[str, Answer] = {name: Answer() for name in requests}
    to_come = [
        replace(one, rank=(2, 0, 1)[number % 3]) for number, one in enumerate(requests.values())
    ]
    num_paused = 0
    for step in count():
        if step % 5 == 0 and to_come:
            one = to_come.pop(0)
            engine.submit(replace(one, matcher=_matcher(one.sampling.grammar)))
        if not to_come and not is_busy(engine):
            break
        outputs = engine.step()
        num_paused += engine.load().running > len(outputs)
        for output in outputs:
            add(got[output.id], output)
    assert num_paused > 15
    for name, answer in got.items():
        assert_same(answer, expected[name])


@pytest.mark.parametrize("name", FEATURES)
def test_a_handover_at_any_position_changes_nothing(
    speculating: BatchingEngine,
    requests: dict[str, EngineRequest],
    expected: dict[str, Answer],
    name: str,
) -> None:
    """An engine gets prompt and log, cut behind each token in turn, and finds nothing computed."""
    whole, original = expected[name], requests[name]
    cuts = [
        replace(original, id=str(cut), logged=whole.tokens[:cut], cache_scope=f"{name} {cut}")
        for cut in range(len(whole.tokens))
    ]
    for cut, answer in answers(speculating, cuts).items():
        assert_same(answer, whole, start=int(cut))
