"""The report and the bundle: the facts that a person looks for, and nothing that is secret."""

import gzip
import hashlib
import json
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from ops.cli import cli
from tests.support.simulated_logs import START_S, Pool, tenant_hash, write


def broken_pool(seed: int = 31) -> Pool:
    """A killed worker, a setting that changed, and from then on a slow worker."""
    pool = Pool(seed=seed, seconds=300, rate=10)
    pool.event(100, "config.changed", "supervisor", "s1", diff={"redis_url": ["a", "redis://db:1"]})
    pool.kill(pool.workers[3], 60, 75, slot="worker 4")
    pool.workers[1].slow = lambda t: 6.0 if t > 150 else 1.0
    pool.fails = lambda request, *_: "ENGINE_ERROR" if request.adapter else None
    return pool


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    write(broken_pool().lines(), folder / "pool.jsonl.gz")
    return folder


def run(*arguments: str) -> tuple[int, str]:
    answer = CliRunner().invoke(cli, ["incident", *arguments], standalone_mode=False)
    assert answer.exception is None, answer.output
    return answer.return_value, answer.output


class Page(HTMLParser):
    """What a page shows, and what it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self._hides = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hides = tag == "style"
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href", "srcset"}]

    def handle_endtag(self, tag: str) -> None:
        self._hides &= tag != "style"

    def handle_data(self, data: str) -> None:
        if not self._hides:
            self.text += f" {' '.join(data.split())}" if data.strip() else ""


def page_of(folder: Path, *arguments: str) -> tuple[int, Page]:
    path = folder / "report.html"
    code, _ = run("report", "-o", str(path), *arguments)
    return code, Page(path)


def test_a_report_says_first_what_happened_since_when_to_whom_why_and_what_to_do(
    logs: Path, tmp_path: Path
) -> None:
    code, page = page_of(tmp_path, "--logs", str(logs))
    assert code == 1
    worker = broken_pool().workers[1].name
    head = page.text[: page.text.index("The pictures")]
    order = (
        "What happened?",
        "Since when?",
        "Who was affected?",
        "Most likely cause",
        "What to do",
    )
    places = [head.index(one) for one in order]
    assert places == sorted(places)
    assert f"Requests with worker {worker} got their tokens slowly" in head
    assert "high confidence" in head
    assert f"Drain worker {worker}" in head
    assert "headrace incident top --bad" in head


def test_a_report_shows_all_panels_and_fetches_nothing(logs: Path, tmp_path: Path) -> None:
    _, page = page_of(tmp_path, "--logs", str(logs))
    for panel in (
        "Requests per second",
        "Time to the first token",
        "Time in the queue",
        "Failures",
        "Cache (KV) in use",
        "Processes",
        "The workers beside one another",
        "Failures by group",
        "What was changed",
        "The log checked as a history",
    ):
        assert panel in page.text
    assert page.fetched == []
    assert "script" not in page.tags
    assert page.tags.count("svg") >= 5
    assert "config.changed" in page.text


def test_what_a_log_does_not_have_is_said_and_never_drawn_as_zero(
    logs: Path, tmp_path: Path
) -> None:
    _, page = page_of(tmp_path, "--logs", str(logs))
    assert "the log has no such figures" in page.text  # nobody measured a cache
    lines = [line for line in broken_pool().lines() if line["service"] != "worker"]
    write(lines, tmp_path / "half.jsonl.gz")
    _, half = page_of(tmp_path, "--logs", str(tmp_path / "half.jsonl.gz"))
    assert "DATA INCOMPLETE" in half.text


def test_a_healthy_log_has_a_quiet_report(tmp_path: Path) -> None:
    write(Pool(seed=32, seconds=200).lines(), tmp_path / "pool.jsonl.gz")
    _, page = page_of(tmp_path, "--logs", str(tmp_path / "pool.jsonl.gz"))
    assert "Nothing unusual in" in page.text
    assert "Most likely cause" not in page.text


def test_nothing_of_a_log_becomes_markup(tmp_path: Path) -> None:
    pool = Pool(seed=33, seconds=200)
    nasty = "<script>alert(1)</script>"
    pool.workers[0].name = nasty
    pool.workers[0].slow = lambda _: 6.0
    pool.event(50, "config.changed", "supervisor", nasty, diff={nasty: [1, 2]})
    write(pool.lines(), tmp_path / "pool.jsonl.gz")
    _, page = page_of(tmp_path, "--logs", str(tmp_path / "pool.jsonl.gz"))
    assert "script" not in page.tags
    assert nasty in page.text


def test_a_report_compares_with_another_log_or_another_time(logs: Path, tmp_path: Path) -> None:
    write(Pool(seed=34, seconds=200).lines(), tmp_path / "before.jsonl.gz")
    _, page = page_of(
        tmp_path, "--logs", str(logs), "--compare-with", str(tmp_path / "before.jsonl.gz")
    )
    assert "Compared with" in page.text
    assert "first token, 99 % within" in page.text
    span = "2026-11-18T11:06:40..2026-11-18T11:08:00"
    _, page = page_of(tmp_path, "--logs", str(logs), "--compare-with", span)
    assert span in page.text


def test_a_bundle_can_be_asked_the_same_and_names_nobody(logs: Path, tmp_path: Path) -> None:
    path = tmp_path / "incident.tar.gz"
    code, _ = run("bundle", "--logs", str(logs), "-o", str(path))
    assert code == 1
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "incident"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    text = gzip.decompress((folder / "events.jsonl.gz").read_bytes()).decode()
    page = (folder / "report.html").read_text()
    for secret in (
        tenant_hash(1),
        "host1",
        "host2",
        "openai-python",
        "curl",
        "redis://",
        "user_agent",
    ):
        assert secret not in text
        assert secret not in page
    _, answer = run("why", "--logs", str(folder / "events.jsonl.gz"), "--json")
    assert json.loads(answer)["findings"][0]["data"]["subject"] == {
        "worker": broken_pool().workers[1].name
    }


def test_a_bundle_renames_consistently_and_differently_each_time(
    logs: Path, tmp_path: Path
) -> None:
    named: list[set[str]] = []
    for number in range(2):
        path = tmp_path / f"{number}.tar.gz"
        run("bundle", "--logs", str(logs), "-o", str(path))
        with tarfile.open(path) as archive:
            file = archive.extractfile("incident/events.jsonl.gz")
            assert file is not None
            lines = [json.loads(line) for line in gzip.decompress(file.read()).splitlines()]
        named.append({line["tenant_hash"] for line in lines if "tenant_hash" in line})
    tenants = {line.get("tenant_hash") for line in broken_pool().lines()} - {None}
    assert len(named[0]) == len(named[1]) == len(tenants)
    assert not named[0] & named[1]


def test_a_time_bounds_a_bundle(logs: Path, tmp_path: Path) -> None:
    path = tmp_path / "part.tar.gz"
    span = ("--since", str(START_S + 100), "--until", str(START_S + 140))
    run("bundle", "--logs", str(logs), "-o", str(path), *span)
    with tarfile.open(path) as archive:
        file = archive.extractfile("incident/events.jsonl.gz")
        assert file is not None
        stamps = [json.loads(line)["ts"] for line in gzip.decompress(file.read()).splitlines()]
    assert stamps
    assert min(stamps) >= "2026-11-18T11:08:20"
    assert max(stamps) < "2026-11-18T11:09:00"
