"""Why: the true cause comes first in made-up logs with one fault each; healthy ones blame nobody.

The logs are small pools of ten minutes; what is asked goes the whole way from lines to findings.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner

from ops.cli import cli
from ops.incident.conditions import parse
from ops.incident.source import open_logs
from ops.incident.spike import find_spikes
from ops.incident.top import find_groups
from ops.incident.why import Verdict, explain
from tests.support.simulated_logs import START_S, Pool, Request, tenant_hash, write


def ask(pool: Pool, folder: Path, bad: str | None = None) -> Verdict:
    path = write(pool.lines(), folder / "pool.jsonl.gz")
    with open_logs([str(path)]) as logs:
        return explain(logs.db, bad=None if bad is None else parse(bad))


def first(pool: Pool, folder: Path) -> dict[str, str]:
    """What the first finding blames."""
    culprit = ask(pool, folder).culprit
    assert culprit is not None, "nobody was named"
    return culprit.subject | culprit.aliases


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("rate", [4, 14])
def test_healthy_logs_name_no_culprit(seed: int, rate: float, tmp_path: Path) -> None:
    verdict = ask(Pool(seed=seed, rate=rate, seconds=300, noise=0.4), tmp_path)
    assert verdict.findings == []


def test_a_slow_worker_is_named_with_its_host_as_alias(tmp_path: Path) -> None:
    pool = Pool(seed=4, seconds=300)
    pool.workers[1].slow = lambda t: 5.0 if 120 < t < 240 else 1.0
    verdict = ask(pool, tmp_path)
    culprit = verdict.culprit
    assert culprit is not None
    assert culprit.subject == {"worker": pool.workers[1].name}
    assert culprit.aliases == {"host": pool.workers[1].host}
    assert culprit.certainty == "high"
    assert culprit.since == pytest.approx(START_S + 120, abs=6)
    assert culprit.risk_low > 1.5


def test_a_gpu_that_fails_under_several_workers_is_named(tmp_path: Path) -> None:
    """Two on each of two GPUs of one host: neither worker nor host tells good from bad."""
    pool = Pool(seed=4, seconds=300)
    for number, worker in enumerate(pool.workers):
        worker.host, worker.gpu = "host1", f"GPU-{number // 2}"
    pool.fails = lambda _, worker, __: (
        "CUDA_OOM" if worker.gpu == "GPU-1" and pool.random.random() < 0.3 else None
    )
    assert first(pool, tmp_path) == {"gpu": "GPU-1"}


def test_a_bad_version_is_named_and_not_one_of_its_workers(tmp_path: Path) -> None:
    pool = Pool(seed=5, seconds=300)
    for worker in pool.workers[2:]:
        worker.model_version = "v2"
    pool.fails = lambda _, worker, __: (
        "NAN_LOGITS" if worker.model_version == "v2" and pool.random.random() < 0.3 else None
    )
    assert first(pool, tmp_path) == {"model_version": "v2"}


def test_a_canary_is_named_by_its_version_and_its_worker_is_the_alias(tmp_path: Path) -> None:
    pool = Pool(seed=6, seconds=300)
    pool.workers[0].model_version = "v2"
    pool.fails = lambda _, worker, __: "ENGINE_ERROR" if worker.model_version == "v2" else None
    culprit = ask(pool, tmp_path).culprit
    assert culprit is not None
    assert culprit.subject == {"model_version": "v2"}
    assert culprit.aliases["worker"] == pool.workers[0].name


def test_two_traits_are_named_together_only_if_neither_alone_says_it(tmp_path: Path) -> None:
    pool = Pool(seed=7, seconds=400)
    pool.fails = lambda request, *_: (
        "ENGINE_ERROR" if request.grammar and request.sampling == "sample" else None
    )
    assert first(pool, tmp_path) == {"grammar": "json_schema", "sampling": "sample"}
    pool.fails = lambda request, *_: "ENGINE_ERROR" if request.grammar else None
    assert first(pool, tmp_path) == {"grammar": "json_schema"}


def test_the_length_from_which_prompts_fail_is_found(tmp_path: Path) -> None:
    pool = Pool(seed=8, seconds=300)
    pool.fails = lambda request, *_: "CUDA_OOM" if request.prompt_tokens > 400 else None
    named = first(pool, tmp_path)["prompt_tokens"]
    assert named.startswith("> ")
    assert 350 < float(named[2:]) <= 400


def test_a_flood_is_named_with_its_tenant(tmp_path: Path) -> None:
    pool = Pool(seed=9, rate=10, seconds=300)
    pool.extra.append(lambda chance: _flood(pool, chance))
    culprit = ask(pool, tmp_path).culprit
    assert culprit is not None
    assert culprit.subject == {"tenant_hash": tenant_hash("flooder"), "component": "load"}
    assert culprit.since == pytest.approx(START_S + 150, abs=5)


def _flood(pool: Pool, chance: Random) -> Iterator[Request]:
    t = 150.0
    while (t := t + chance.expovariate(70)) < 190:
        yield pool.request(t, tenant=tenant_hash("flooder"))


def test_who_asks_for_long_answers_is_named_although_prompts_are_longer(tmp_path: Path) -> None:
    """A token of an answer takes a step; those of a prompt share one."""
    pool = Pool(seed=17, rate=6, seconds=300, num_workers=2, slots=4)
    pool.extra.append(lambda chance: _long_answers(pool, chance))
    culprit = ask(pool, tmp_path).culprit
    assert culprit is not None
    assert culprit.subject["tenant_hash"] == tenant_hash("writer")


def _long_answers(pool: Pool, chance: Random) -> Iterator[Request]:
    t = 150.0
    while (t := t + chance.expovariate(2.5)) < 190:
        yield pool.request(t, tenant=tenant_hash("writer"), prompt_tokens=60, max_tokens=400)


def test_clients_that_read_slowly_are_named(tmp_path: Path) -> None:
    pool = Pool(seed=18, seconds=300)
    pool.blocks = lambda request: 2.0 if request.user_agent == "curl" and request.t > 150 else 0.0
    culprit = ask(pool, tmp_path).culprit
    assert culprit is not None
    assert culprit.subject == {"user_agent": "curl"}
    assert culprit.explains == ["were read slowly by their clients"]


def test_a_worker_that_stood_still_for_a_moment_is_named_by_its_own_words(tmp_path: Path) -> None:
    """Three requests are too few to be a pattern."""
    pool = Pool(seed=19, seconds=300)
    held = pool.workers[2]
    held.stalls.append((150.0, 153.0))
    pool.event(153.0, "process.paused", "worker", held.name, paused_s=3.0, computed_s=0.0,
               level="warning")  # fmt: skip
    culprit = ask(pool, tmp_path).culprit
    assert culprit is not None
    assert culprit.subject == {"worker": held.name}
    assert culprit.since == pytest.approx(START_S + 150, abs=0.1)


def test_a_pause_of_everything_is_told_from_a_slow_worker(tmp_path: Path) -> None:
    pool = Pool(seed=10, seconds=300)
    pool.pause_all(150, 162)
    culprit = ask(pool, tmp_path).culprit
    assert culprit is not None
    assert culprit.kind == "standstill"
    assert culprit.since == pytest.approx(START_S + 150, abs=1.5)


def test_a_killed_worker_is_named_although_only_those_that_it_held_were_moved(
    tmp_path: Path,
) -> None:
    pool = Pool(seed=11, seconds=300, rate=20)
    pool.kill(pool.workers[0], 150, 165, slot="worker 1")
    culprit = ask(pool, tmp_path).culprit
    assert culprit is not None
    assert culprit.kind == "worker_lost"
    assert culprit.subject == {"worker": pool.workers[0].name, "slot": "worker 1"}
    assert "SIGKILL" in culprit.cause


def test_a_killed_gateway_is_named_for_the_requests_without_an_end(tmp_path: Path) -> None:
    pool = Pool(seed=12, seconds=300, rate=15)
    pool.kill_gateway("g2", 150)
    culprit = ask(pool, tmp_path).culprit
    assert culprit is not None
    assert culprit.subject["gateway"] == "g2"
    assert culprit.explains == ["never got an end"]


def test_a_changed_setting_is_named_for_what_began_with_it(tmp_path: Path) -> None:
    pool = Pool(seed=13, seconds=300)
    pool.event(150, "config.changed", "supervisor", "s1", diff={"kv_tokens": [4096, 64]})
    pool.fails = lambda _, __, t: "ENGINE_ERROR" if t > 150 and pool.random.random() < 0.2 else None
    culprit = ask(pool, tmp_path).culprit
    assert culprit is not None
    assert culprit.kind == "config"
    assert "kv_tokens" in culprit.cause


def test_a_wrong_clock_is_said_although_nobody_suffers(tmp_path: Path) -> None:
    pool = Pool(seed=14, seconds=200)
    pool.event(60, "clock.sampled", "worker", pool.workers[0].name, offset_s=300.0)
    assert first(pool, tmp_path)["worker"] == pool.workers[0].name


def test_what_somebody_injected_is_never_the_evidence(tmp_path: Path) -> None:
    pool = Pool(seed=15, seconds=200)
    pool.event(60, "fault.injected", "command", "c1", fault="slow", params={},
               target=pool.workers[0].name, level="warning")  # fmt: skip
    assert ask(pool, tmp_path).findings == []


def test_a_condition_replaces_what_is_bad(tmp_path: Path) -> None:
    pool = Pool(seed=16, seconds=300)
    pool.refuses = lambda request: (
        "BAD_REQUEST" if request.user_agent == "langchain" and request.api == "tgi" else None
    )
    culprit = ask(pool, tmp_path, "code = BAD_REQUEST").culprit
    assert culprit is not None
    assert culprit.subject == {"user_agent": "langchain", "api": "tgi"}


def test_an_onset_is_found_to_the_bucket(tmp_path: Path) -> None:
    pool = Pool(seed=17, seconds=600, rate=10)
    pool.fails = lambda _, __, t: (
        "ENGINE_ERROR" if 400 < t < 500 and pool.random.random() < 0.3 else None
    )
    path = write(pool.lines(), tmp_path / "pool.jsonl.gz")
    with open_logs([str(path)]) as logs:
        verdict = explain(logs.db)
        spikes = find_spikes(logs.db, verdict.symptoms)
    assert [spike.figure for spike in spikes] == ["errors"]
    assert spikes[0].start == pytest.approx(START_S + 400, abs=2 * spikes[0].bucket_s)
    assert spikes[0].end == pytest.approx(START_S + 500, abs=2 * spikes[0].bucket_s)


def test_a_version_whose_answers_are_corrupt_is_named_although_nothing_failed(
    tmp_path: Path,
) -> None:
    """As ``why`` and as a group of their own in ``top``."""
    pool = Pool(seed=20, seconds=300)
    for worker in pool.workers[2:]:
        worker.model_version = "v2"
    lines = pool.lines()
    for line in lines:
        if line["event"] in ("worker.finished", "request.finished"):
            line.update({"flagged": "repetition"} if line["model_version"] == "v2" else {})
    path = write(lines, tmp_path / "pool.jsonl.gz")
    with open_logs([str(path)]) as logs:
        culprit = explain(logs.db).culprit
        [group] = [it for it in find_groups(logs.db) if it.code == "OUTPUT_CORRUPT"]
        of_v2 = explain(logs.db, bad=parse("flagged=repetition")).culprit
    assert culprit is not None
    assert culprit.subject == {"model_version": "v2"}
    assert of_v2 is not None
    assert of_v2.subject == {"model_version": "v2"}
    assert (group.fingerprint, group.model_version) == ("repetition", "v2")
    assert group.meaning
    assert "OUTPUT_CORRUPT: An answer that" in _run(tmp_path, "top", code=1)


def test_groups_say_since_when_and_what_is_new_or_back(tmp_path: Path) -> None:
    pool = Pool(seed=18, seconds=400)
    pool.fails = lambda request, __, t: (
        ("NAN_LOGITS" if t > 300 else "CUDA_OOM" if t < 30 or t > 350 else None)
        if request.api == "tgi"
        else None
    )
    path = write(pool.lines(), tmp_path / "pool.jsonl.gz")
    with open_logs([str(path)]) as logs:
        groups = {group.code: group for group in find_groups(logs.db)}
    assert groups["NAN_LOGITS"].badge == "NEW"
    assert groups["NAN_LOGITS"].actor == "developer"
    assert groups["NAN_LOGITS"].model_version == "v1"
    assert groups["NAN_LOGITS"].first_seen > START_S + 299
    assert groups["CUDA_OOM"].badge == ""
    assert groups["CUDA_OOM"].example


def test_the_commands_tell_a_person_and_a_program(tmp_path: Path) -> None:
    pool = Pool(seed=19, seconds=200)
    pool.fails = lambda request, *_: "ENGINE_ERROR" if request.grammar else None
    write(pool.lines(), tmp_path / "pool.jsonl.gz")
    for command in ("why", "spike"):
        text = _run(tmp_path, command, code=1)
        assert "grammar=json_schema" in text
        assert "next: headrace incident top --bad" in text
    since = ("--since", str(START_S + 100))
    assert "grammar=json_schema" in _run(tmp_path, "why", *since, code=1)
    answer = json.loads(_run(tmp_path, "top", "--json", code=1))
    assert answer["groups"][0]["code"] == "ENGINE_ERROR"
    refusal = CliRunner().invoke(cli, ["incident", "why", "--bad", "colour = red"])
    assert refusal.exit_code == 2
    assert "'colour' is no field" in refusal.output


def _run(logs: Path, *arguments: str, code: int) -> str:
    """What a command says of ``logs``; it must end with ``code``."""
    line = ["incident", *arguments, "--logs", str(logs)]
    answer = CliRunner().invoke(cli, line, standalone_mode=False)
    assert answer.return_value == code, answer.output
    return answer.output


def test_the_made_up_lines_are_such_as_processes_write(tmp_path: Path) -> None:
    """Each test checks the lines in its folder against the schema; the other ones are packed."""
    pool = Pool(seed=20, seconds=12)
    pool.fails = lambda request, *_: "ENGINE_ERROR" if request.grammar else None
    pool.refuses = lambda request: "BAD_REQUEST" if request.user_agent == "curl" else None
    pool.kill(pool.workers[0], 5, 7, slot="worker 1")
    pool.kill_gateway("g2", 8)
    assert write(pool.lines(), tmp_path / "lines.jsonl").stat().st_size > 0
