"""Two answers are compared to the token, and what it takes to ask again is read from the log."""

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from common.messages import Sampling
from gateway.answer import _numbers_of
from ops.incident import replay
from ops.incident.recipe import Answer, CannotReplay, Logged, Recipe, _logged_sampling
from ops.incident.replay import _completion_body, compare
from tests.support.simulated_logs import Pool, write


def answer(*tokens: int, finish_reason: str = "length", by: str = "then") -> Answer:
    pieces = [chr(96 + token) for token in tokens]
    return Answer(by=by, tokens=list(tokens), pieces=pieces, finish_reason=finish_reason)


def test_the_first_token_that_differs_is_found() -> None:
    found = compare(answer(1, 2, 3, 4), answer(1, 2, 9, 4, by="now"))
    assert (found.position, found.num_same) == (2, 2)
    assert (found.left_token, found.right_token) == (3, 9)
    assert (found.left_text, found.right_text) == ("abcd", "abid")
    assert compare(answer(1, 2, 3), answer(1, 2, 3)).position is None


def test_a_shorter_answer_differs_at_its_end_unless_it_was_cut() -> None:
    assert compare(answer(1, 2), answer(1, 2, 3)).position == 2
    assert compare(answer(1, 2, 3), answer(1, 2)).position == 2
    assert compare(answer(1, 2, finish_reason="cancelled"), answer(1, 2, 3)).position is None


def test_texts_are_compared_where_ids_are_not_known() -> None:
    theirs = msgspec.structs.replace(answer(1, 2, 9), tokens=[], pieces=["abi"])
    assert compare(answer(1, 2, 3), theirs).position == 2
    equal = compare(answer(1, 2, 9), theirs)
    assert (equal.position, equal.num_same) == (None, 3)


def test_what_workers_died_of_is_not_run_again_unasked(tmp_path: Path) -> None:
    pool = Pool(seconds=20, fails=lambda *_: "POISON_REQUEST")
    lines = pool.lines()
    path = write(lines, tmp_path / "pool.jsonl")
    id = next(line["request_id"] for line in lines if line.get("code") == "POISON_REQUEST")
    options = [id, f"--logs={path}", f"--data-dir={tmp_path}"]
    refused = CliRunner().invoke(replay.main, options, standalone_mode=False)
    assert isinstance(refused.exception, CannotReplay)
    assert "--yes" in refused.exception.message


def logged(**asked: object) -> Logged:
    return Logged(job_id="r1.0", asked={"request_id": "r1"} | asked, made={})


def test_parameters_come_back_from_the_log() -> None:
    """What a gateway writes is all it takes, unless it holds a user's words."""
    used = Sampling(
        max_new_tokens=9, seed=2**63 + 5, do_sample=True, temperature=0.3, top_p=0.5, top_k=7
    )
    line = msgspec.json.decode(
        msgspec.json.encode(
            {"max_tokens": 9, "seed": used.seed, "sampling": "sample", "temperature": 0.3}
            | _numbers_of(used)
        )
    )
    assert _logged_sampling(logged(**line), None) == used
    with_stop = msgspec.structs.replace(used, stop=("secret",), logit_bias={5: 1.0})
    told = _numbers_of(with_stop)
    assert set(told["unlogged"]) == {"stop", "logit_bias"}
    assert "secret" not in str(told)
    with pytest.raises(CannotReplay, match="stop"):
        _logged_sampling(logged(**line | told), None)
    again = _logged_sampling(logged(**line | told), msgspec.structs.replace(with_stop, seed=1))
    assert again == with_stop


def test_a_drawn_answer_without_its_seed_can_not_be_asked_for_again() -> None:
    with pytest.raises(CannotReplay, match="seed"):
        _logged_sampling(logged(sampling="sample", max_tokens=3), None)
    assert _logged_sampling(logged(sampling="greedy", max_tokens=3), None).max_new_tokens == 3


def test_several_prompts_and_choices_are_told_apart() -> None:
    one = Logged(job_id="r1-2.1", asked={"request_id": "r1"}, made={})
    assert (one.prompt_number, one.choice) == (2, 1)
    assert logged().prompt_number == 0


def test_what_other_servers_have_no_field_for_is_refused() -> None:
    recipe = Recipe(
        prompt=[1, 2],
        sampling=Sampling(max_new_tokens=5, seed=3, do_sample=True, temperature=0.5, top_p=0.9),
        adapter="",
        origin="",
    )
    body = _completion_body(recipe)
    assert body["prompt"] == [1, 2]
    assert (body["seed"], body["top_p"], body["temperature"]) == (3, 0.9, 0.5)
    odd = msgspec.structs.replace(recipe.sampling, relative_frequency_penalty=0.5)
    with pytest.raises(CannotReplay, match="relative_frequency_penalty"):
        _completion_body(msgspec.structs.replace(recipe, sampling=odd))
