"""What a load test and a comparison leave behind: tables, JSON, plots, the README's figures."""

from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from ops.bench import comparison, installed, report
from ops.bench.comparison import Comparison, EngineRow, Row
from ops.bench.engine import Figures
from ops.bench.load import Level, Spread
from ops.bench.machine import describe
from ops.bench.processes import running, use_of
from ops.bench.report import Measured, Report
from ops.bench.scenarios import Scenarios
from tests.support.waiting import wait_until


def level(
    concurrency: int, rate: float, failures: dict[str, int] | None = None, per_event: float = 1.0
) -> Level:
    times = Spread(10.0, 20.0, 30.0, 40.0)
    return Level(
        concurrency=concurrency,
        requests=4,
        failures=failures or {},
        seconds=1.0,
        output_tokens=512,
        tokens_per_second=rate,
        prompt_tokens=64.0,
        tokens_per_answer=128.0,
        tokens_per_event=per_event,
        first_token_ms=times,
        gap_ms=times,
        per_token_ms=times,
        whole_ms=times,
        client_cpu=0.05,
    )


def servers(*levels: list[Level]) -> Report:
    return Report(
        prompt_tokens=64,
        new_tokens=128,
        shared_prefix=0,
        measured=[
            Measured(url=f"http://{number}.test", model="m", api="chat", levels=each)
            for number, each in enumerate(levels)
        ],
    )


def compared() -> Comparison:
    figures = Figures(32, 1000.0, 200.0, 400.0, 20.0, 30.0)
    ours = Row(name="Headrace", version="1.0", rss_bytes={"workers": 2**30, "gateway": 2**29})
    ours.add(level(32, 700.0), {"workers": 1.5})
    ours.add(level(32, 800.0), {"workers": 1.6})
    ours.add(level(32, 600.0), {"workers": 1.7})
    ours.scenarios = Scenarios(
        crowded_gap_ms=Spread(10.0, 20.0, 25.0, 30.0),
        shared_prefix_ratio=0.25,
        short_context_gap_ms=None,
        long_context_gap_ms=None,
    )
    return Comparison(
        date="2026-01-01",
        machine=describe(),
        model="m",
        prompt_tokens=64,
        new_tokens=128,
        rounds=2,
        concurrency=[8, 32],
        busy_before=0.0,
        rows=[ours, Row(name="vLLM", failure="it did not start")],
        engines=[EngineRow(name="way 'step'", levels={32: figures})],
        absent=["llama.cpp"],
    )


def shown(result: Report) -> str:
    console = Console(width=100, record=True, quiet=False, file=Path("/dev/null").open("w"))  # noqa: SIM115
    report.show(result, console)
    console.file.close()
    return console.export_text()


def test_the_table_compares_with_the_first_server_and_names_failures() -> None:
    text = shown(
        servers(
            [level(1, 50.0), level(8, 200.0)], [level(1, 25.0), level(8, 300.0, {"cut off": 2})]
        )
    )
    assert "50.0" in text
    assert "10.0 / 30.0" in text
    assert "0.50" in text
    assert "1.50" in text
    assert "failed: 2 × cut off" in text


def test_the_table_says_when_events_hold_several_tokens() -> None:
    assert "4 tokens an event" in shown(servers([level(1, 50.0, per_event=4.0)]))
    assert "an event" not in shown(servers([level(1, 50.0)]))


def test_json_holds_what_was_measured(tmp_path: Path) -> None:
    result = servers([level(1, 50.0)])
    report.write_json(result, tmp_path / "out.json")
    assert msgspec.json.decode((tmp_path / "out.json").read_bytes(), type=Report) == result


@pytest.mark.parametrize(("name", "begins"), [("p.svg", b"<?xml"), ("p.png", b"\x89PNG")])
def test_the_plot_is_drawn_in_the_format_of_its_name(
    tmp_path: Path, name: str, begins: bytes
) -> None:
    report.draw(servers([level(1, 50.0), level(8, 90.0)], [level(1, 20.0)]), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_a_row_keeps_the_best_of_its_rounds() -> None:
    row = compared().rows[0]
    assert row.rate(32) == 800.0
    assert row.cores[32] == {"workers": 1.6}
    assert row.rate(8) is None


def test_the_comparison_shows_every_server_and_who_is_absent() -> None:
    text = comparison.markdown(compared())
    assert "| Headrace 1.0 | – | 800 | 10 ms | 10 / 30 ms | 1.5 GiB, worker 1.0 |" in text
    assert "| vLLM | – | – | – | – | – |" in text
    assert "80% at 32" in text
    assert "| 10 / 25 ms | 0.25 |" in text
    assert "Not installed there: llama.cpp." in text


def test_the_comparison_is_put_between_its_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    marks = ("<!-- begin: make bench-engine -->", "<!-- end: make bench-engine -->")
    readme.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nbehind\n")
    comparison.put_into(readme, "new")
    assert readme.read_text() == f"before\n{marks[0]}\nnew\n{marks[1]}\nbehind\n"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="no lines"):
        comparison.put_into(readme, "new")


def test_the_readme_has_room_for_the_comparison(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((Path(__file__).parents[2] / "README.md").read_text())
    comparison.put_into(copy, comparison.markdown(compared()))
    assert "| Headrace 1.0 |" in copy.read_text()


def test_peers_are_what_lies_in_their_folder(tmp_path: Path) -> None:
    assert installed.absent(tmp_path) == ["vLLM", "transformers serve", "llama.cpp"]
    for path in ("vllm/bin/python", "llama.cpp/build/bin/llama-server", "models/m-bf16.gguf"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found = list(installed.peers(tmp_path, tmp_path / "store" / "m", 8000))
    assert [server.name for server in found] == ["vLLM, bf16", "llama.cpp, bf16"]
    assert installed.absent(tmp_path) == ["transformers serve"]


async def test_a_server_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    script = "sleep 300 & echo started; wait"
    with running(["bash", "-c", script], {}, tmp_path / "log") as process:
        await wait_until(
            lambda: (tmp_path / "log").read_text() == "started\n", timeout_s=20, what="a child"
        )
        pid = process.pid
        # A child goes by its parent's name until it has become another program.
        await wait_until(
            lambda: set(use_of(pid).rss_bytes) == {"bash", "sleep"}, timeout_s=20, what="two names"
        )
    assert process.returncode is not None
    assert not use_of(pid).rss_bytes
