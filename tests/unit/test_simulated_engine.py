"""The simulated engine: the product's own stand-in for a model."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.failures import Failure
from common.models.tokenizer import Tokenizer
from common.settings import WorkerSettings
from tests.support.engines import request, run_all, run_one
from tests.support.grammars import Residues
from tests.support.models import simulated
from workers.engine.factory import build_engine
from workers.engine.port import Engine, EngineRequest
from workers.engine.simulated import SCRIPT


def settings(data_dir: Path, **values: Any) -> WorkerSettings:
    """At zero delay; ``values`` outrank."""
    chosen: dict[str, Any] = {
        "model": "simulated",
        "simulated_first_token_ms": 0,
        "simulated_inter_token_ms": 0,
    }
    return WorkerSettings(data_dir=data_dir, engine="simulated", **(chosen | values))


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return build_engine(settings(tmp_path))


@pytest.fixture
def tokenizer(engine: Engine, tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(tmp_path / "models" / "simulated")


def test_it_speaks_its_script_and_ends_by_itself(engine: Engine, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Tell me")
    got = run_one(engine, request("g", prompt, max_new_tokens=4000))
    assert got.finish is not None
    assert got.finish.reason == "eos_token"
    assert got.text.startswith(SCRIPT)
    assert got.text.endswith(SCRIPT)
    assert got.text == tokenizer.decode(got.tokens)


def test_the_text_depends_on_prompt_and_seed(engine: Engine, tokenizer: Tokenizer) -> None:
    """The seed counts where a real engine would use it: when sampling."""

    def text(prompt: str, **sampling: Any) -> str:
        return run_one(
            engine, request("g", tokenizer.encode(prompt), max_new_tokens=300, **sampling)
        ).text

    assert text("a") == text("a", seed=9) != text("b")
    assert text("a", do_sample=True, seed=1) != text("a", do_sample=True, seed=2)


def test_another_worker_continues_identically(
    engine: Engine, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole_request = request("g", tokenizer.encode("Go on"), max_new_tokens=60, stop=("zzz",))
    whole = run_one(engine, whole_request)
    other = build_engine(settings(tmp_path))
    assert other.model_version == engine.model_version
    assert engine.model_version == simulated(tmp_path).manifest.version
    for cut in (0, 1, 30, 59):
        handed = EngineRequest(
            "g", whole_request.prompt, whole_request.sampling, whole.tokens[:cut]
        )
        rest = run_one(other, handed)
        assert (rest.tokens, rest.pieces) == (whole.tokens[cut:], whole.pieces[cut:])


def test_limits_and_stops_are_those_of_the_real_engine(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode("x")
    got = run_all(
        engine,
        [
            request("limit", prompt, max_new_tokens=5),
            request("stop", prompt, max_new_tokens=500, stop=(".",)),
            request("keep", prompt, max_new_tokens=500, stop=(".",), keep_stop=True),
        ],
    )
    assert len(got["limit"].tokens) == 5
    assert got["stop"].text + "." == got["keep"].text
    assert got["keep"].text in SCRIPT


def test_latencies_are_as_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of a prompt takes one time, each further step the other."""
    slept: list[float] = []
    monkeypatch.setattr("workers.engine.simulated.time.sleep", slept.append)
    engine = build_engine(
        settings(tmp_path, simulated_first_token_ms=30, simulated_inter_token_ms=4)
    )
    run_one(engine, request("g", [65, 66], max_new_tokens=4))
    assert slept == [0.03, 0.004, 0.004, 0.004]


def test_a_model_that_is_not_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="nothing-like-it") as caught:
        build_engine(settings(tmp_path, model="nothing-like-it"))
    assert caught.value.code == "MODEL_NOT_FOUND"


def test_it_starts_without_torch(tmp_path: Path) -> None:
    """A simulated worker is up in a moment and small."""
    code = (
        "import sys; from pathlib import Path\n"
        "from common.settings import WorkerSettings\n"
        "from workers.engine.factory import build_engine\n"
        "build_engine(WorkerSettings(engine='simulated', model='simulated',"
        f" data_dir=Path({str(tmp_path)!r})))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_it_makes_up_what_a_prompt_was_worth(engine: Engine, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Tell me about the river")
    asked = request("g", prompt, prompt_logprobs=True, top_logprobs=2, max_new_tokens=1)
    engine.submit(asked)
    (output,) = engine.step()
    assert output.prompt is not None
    assert [logprob is None for logprob in output.prompt.logprobs] == [True] + [False] * (
        len(prompt) - 1
    )
    assert output.prompt.tops is not None
    assert [len(top or ()) for top in output.prompt.tops] == [0] + [2] * (len(prompt) - 1)


def test_it_keeps_to_a_grammar(engine: Engine, tokenizer: Tokenizer) -> None:
    matcher = Residues()
    one = replace(request("g", tokenizer.encode("Tell me")), matcher=matcher)
    got = run_one(engine, one)
    count = len(matcher.taken)
    assert count > 3
    assert matcher.taken == got.tokens[:count]
    assert [token % 3 for token in matcher.taken] == ([1, 2, 0] * 6)[:count]
