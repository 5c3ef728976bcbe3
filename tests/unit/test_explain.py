"""`headrace explain`: each code has its words, and who mistypes one is led to it."""

import inspect
import re
import sys
from collections.abc import Callable

import pytest

from common.explanations import EXPLANATIONS, INSIDE, SAID_AS
from common.failures import KINDS
from ops import batch, cli, doctor
from ops.explain import alert_pages
from workers import exit_codes

Explain = Callable[..., tuple[int, str]]


@pytest.fixture
def explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Explain:
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["headrace", "explain", *arguments])
        with pytest.raises(SystemExit) as ending:
            cli.main()
        captured = capsys.readouterr()
        return int(str(ending.value.code)), captured.out + captured.err

    return run


def words_of(text: str) -> str:
    return " ".join(text.split())


def test_every_code_has_its_entry() -> None:
    assert EXPLANATIONS.keys() == KINDS.keys()
    assert not INSIDE.keys() & KINDS.keys()
    assert not SAID_AS.keys() & (KINDS.keys() | INSIDE.keys())
    assert set(SAID_AS.values()) <= KINDS.keys()


@pytest.mark.parametrize("code", KINDS)
def test_a_code_is_explained_with_what_its_row_and_its_entry_say(
    explain: Explain, code: str
) -> None:
    ended, text = explain(code)
    kind, entry = KINDS[code], EXPLANATIONS[code]
    said = words_of(text)
    assert ended == 0
    for words in (code, kind.meaning, str(kind.status), kind.openai_type, entry.cause, entry.fix):
        assert words in said
    assert all(check in said for check in entry.checks)
    assert ("Retry yes" in said) == kind.retryable
    assert entry.runbook in said


@pytest.mark.parametrize("code", INSIDE)
def test_a_cause_that_no_client_is_told_says_where_it_is_seen(explain: Explain, code: str) -> None:
    ended, text = explain(code)
    assert ended == 0
    assert INSIDE[code].seen_as in words_of(text)


@pytest.mark.parametrize("spelling", ["queue_full", "Queue-Full", "QUEUE_FULL", "load_shed"])
def test_a_code_may_be_written_as_it_stands_in_an_answer(explain: Explain, spelling: str) -> None:
    ended, text = explain(spelling)
    assert ended == 0
    assert KINDS["QUEUE_FULL"].meaning in text


def test_who_acts_on_tgi_routes_and_elsewhere_reads_both_statuses(explain: Explain) -> None:
    assert "400 (422 on TGI's routes)" in explain("BAD_REQUEST")[1]


def test_a_near_miss_is_answered_with_what_was_meant(explain: Explain) -> None:
    ended, text = explain("NO_WORKER")
    assert ended == 1
    assert "did you mean NO_WORKERS" in text
    assert "headrace explain" in explain("xyzzy")[1]


def test_every_exit_code_of_a_process_is_explained(explain: Explain) -> None:
    ours = [value for _, value in inspect.getmembers(exit_codes) if isinstance(value, int)]
    of_batch = [batch.SOME_FAILED, batch.NOT_COMPLETED]
    for code in (*ours, *of_batch, *doctor.EXIT_CODES.values(), 130):
        ended, text = explain(str(code))
        assert ended == 0, text
        assert re.search(r"\w{5}", text.partition(str(code))[2])
    assert "worker" in explain(str(exit_codes.STALLED))[1]
    assert "doctor" in explain(str(doctor.EXIT_CODES["eviction"]))[1]


@pytest.mark.parametrize("code", ["137", "-9"])
def test_a_signal_is_named_however_it_is_counted(explain: Explain, code: str) -> None:
    assert "SIGKILL" in explain(code)[1]


def test_an_exit_code_that_nobody_uses_is_not_explained(explain: Explain) -> None:
    assert explain("99")[0] == 1


def test_the_name_of_an_alert_brings_its_page(explain: Explain) -> None:
    for alert in alert_pages():
        ended, text = explain(alert.lower())
        assert ended == 0
        assert alert in text
        assert "Call somebody when" in text
        assert alert in explain()[1]


def test_the_table_has_a_line_for_each_code(explain: Explain) -> None:
    ended, text = explain()
    assert ended == 0
    lines = text.splitlines()
    for code in (*KINDS, *INSIDE):
        assert [line for line in lines if line.startswith(f"{code} ")], code
