"""The language of `--bad`: what it can say, and that nothing of it becomes SQL."""

import duckdb
import pytest

from ops.incident.conditions import BadCondition, parse

ROWS = """
    SELECT n FROM (VALUES
        (1, 'ok', 0.2, 'interactive', 'w1', 'curl/8', true),
        (2, 'CUDA_OOM', 3.0, 'batch', 'w2', 'openai', true),
        (3, NULL, 5.0, 'interactive', 'w2', 'openai', false)
    ) AS requests(n, code, ttft, lane, worker, user_agent, stream)
"""


def _chosen(text: str) -> list[int]:
    condition = parse(text)
    with duckdb.connect() as db:
        chosen = db.execute(ROWS + f" WHERE {condition.sql} ORDER BY n", condition.values)
        return [row[0] for row in chosen.fetchall()]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ('code="CUDA_OOM"', [2]),
        ("code == CUDA_OOM", [2]),
        ("code != ok", [2, 3]),
        ("code = null", [3]),
        ("code != NULL", [1, 2]),
        ("ttft > 2.5 and lane = interactive", [3]),
        ("ttft<=0.2 or worker = 'w2' and code = CUDA_OOM", [1, 2]),
        ("not (worker in (w1, w3))", [2, 3]),
        ("user_agent ~ curl", [1]),
        ("stream = true", [1, 2]),
        ("not code = CUDA_OOM", [1, 3]),
        ("n >= 2", [2, 3]),
    ],
)
def test_a_condition_chooses(text: str, chosen: list[int]) -> None:
    assert _chosen(text) == chosen


def test_a_value_stays_a_value() -> None:
    assert _chosen("""code = "x' OR 1=1 --" """) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("colour = red", "'colour' is no field"),
        ("ttft > soon", "'soon' is no number"),
        ("code", "a comparison is missing"),
        ("code =", "a value is missing"),
        ("(code = ok", "')' is missing"),
        ("code = ok; drop", "did not expect"),
        ("code & ok", "is no comparison"),
        ("", "a field is missing"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(text: str, says: str) -> None:
    with pytest.raises(BadCondition, match=says.replace("(", r"\(").replace(")", r"\)")):
        parse(text)
