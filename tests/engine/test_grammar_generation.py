"""Generations that keep to a grammar, beside others that do not, and across handovers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from common.messages import Grammar
from tests.support.engines import MAX_COST, Transcript, request, run_all, run_one, tiny_engine
from tests.support.matching import matcher_of, schema_of
from workers.engine.port import EngineRequest

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["new", "vip", "é"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WORDS = Grammar("regex", "[a-zé😀-😎]{3,8}( [a-z]{2,6}){1,4}[.!?]")
SUM = Grammar("ebnf", 'root ::= number (" + " number){2,3}\nnumber ::= [1-9] [0-9]?')
ENDLESS = Grammar("regex", "(.|\n)*")
COUNTED = Grammar("regex", "(([ab]{1,100}){1,100}){1,100}")
"""Compiles at once; each token makes it harder to say what may come next."""
AMBIGUOUS = Grammar("ebnf", 'start: a\na: a a a | a a | "x" | "y" | ""')
"""The same by a rule that can read every text in exponentially many ways."""


def spec(
    id: str, grammar: Grammar | None, logged: list[int] | None = None, **sampling: Any
) -> EngineRequest:
    """A sampled generation, of up to 200 tokens where ``sampling`` says nothing else."""
    values = {"do_sample": True, "seed": 5, "max_new_tokens": 200, "grammar": grammar} | sampling
    made = request(id, [70, 71, 72], logged=logged, **values)
    return EngineRequest(
        made.id,
        made.prompt,
        made.sampling,
        made.logged,
        matcher=matcher_of(grammar) if grammar else None,
    )


def test_each_keeps_to_its_own_grammar_in_one_batch(tiny_model: Path) -> None:
    """A random model says nothing sensible, and still each answer is of its kind."""
    seeds = range(4)
    requests = [
        spec(f"{kind} {seed}", grammar, seed=seed)
        for seed in seeds
        for kind, grammar in (("person", schema_of(PERSON)), ("words", WORDS), ("sum", SUM))
    ]
    got = run_all(tiny_engine(tiny_model), [*requests, spec("free", None)])
    for seed in seeds:
        Draft202012Validator(PERSON).validate(json.loads(got[f"person {seed}"].text))
        assert re.fullmatch(WORDS.value, got[f"words {seed}"].text)
        assert len(list(map(int, got[f"sum {seed}"].text.split(" + ")))) in (3, 4)
    constrained = [got[request.id].finish for request in requests]
    assert {finish.reason for finish in constrained if finish} == {"eos_token"}


@pytest.mark.parametrize("grammar", [schema_of(PERSON), WORDS, SUM], ids=["json", "regex", "ebnf"])
def test_a_handover_at_every_token_changes_nothing(tiny_model: Path, grammar: Grammar) -> None:
    """The next worker follows the grammar through the log and goes on in it."""
    engine = tiny_engine(tiny_model)
    whole = run_one(engine, spec("g", grammar))
    assert 5 < len(whole.tokens) < 150
    cuts = range(1, len(whole.tokens))
    requests = [spec(str(cut), grammar, whole.tokens[:cut]) for cut in cuts]
    rests = run_all(engine, requests)
    for cut in cuts:
        rest = rests[str(cut)]
        assert (rest.tokens, rest.pieces) == (whole.tokens[cut:], whole.pieces[cut:])


def test_a_log_that_breaks_its_grammar_is_not_continued(tiny_model: Path) -> None:
    finish = run_one(tiny_engine(tiny_model), spec("g", SUM, [100, 101])).finish
    assert finish is not None
    assert (finish.reason, finish.code) == ("failed", "GRAMMAR_REJECTED")


@pytest.mark.parametrize("grammar", [COUNTED, AMBIGUOUS], ids=["counted", "ambiguous"])
def test_a_grammar_that_gets_too_hard_ends_its_generation_alone(
    tiny_model: Path, grammar: Grammar
) -> None:
    """Beside it everybody gets a token in each step, the same as without it."""
    others = [spec("a", None), spec("b", ENDLESS)]
    alone = run_all(tiny_engine(tiny_model), others)
    others = [spec("a", None), spec("b", ENDLESS)]
    hard = spec("hard", grammar, max_new_tokens=MAX_COST - 3, logit_bias={0: -100.0, 2: -100.0})
    got = run_all(tiny_engine(tiny_model), [*others, hard])
    assert {id: got[id] for id in "ab"} == alone
    finish = got["hard"].finish
    assert finish is not None
    assert (finish.reason, finish.code) == ("failed", "GRAMMAR_REJECTED")
    assert "too much work" in finish.message


def test_an_endless_expression_runs_to_its_length(tiny_model: Path) -> None:
    """Its end is allowed at every place, and this model never wants it."""
    got: Transcript = run_one(
        tiny_engine(tiny_model), spec("g", ENDLESS, do_sample=False, max_new_tokens=100)
    )
    assert got.finish is not None
    assert got.finish.reason == "length"
    assert len(got.tokens) == 100
