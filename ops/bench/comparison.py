"""The figures of one run of `headrace bench peers`, and the table that people read.

Structs as they are written to JSON; Markdown as it stands in the project's README.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ops.bench.engine import Figures
from ops.bench.load import Level, Spread
from ops.bench.machine import Machine
from ops.bench.scenarios import Scenarios

_BEGIN = "<!-- begin: make bench-engine -->"
_END = "<!-- end: make bench-engine -->"
_AT = 32
"""Clients for which latencies are shown."""


class Row(msgspec.Struct, kw_only=True):
    """One server's figures, the best of all rounds; by number of clients."""

    name: str
    version: str = ""
    levels: dict[int, Level] = {}
    cores: dict[int, dict[str, float]] = {}
    """Cores in use by each process while that level was measured."""
    rss_bytes: dict[str, int] = {}
    """Of each process, after all levels of the last round."""
    scenarios: Scenarios | None = None
    failure: str = ""

    def add(self, level: Level, cores: dict[str, float]) -> None:
        """Keep it if it is better than what there is."""
        best = self.levels.get(level.concurrency)
        if best is None or level.tokens_per_second > best.tokens_per_second:
            self.levels[level.concurrency] = level
            self.cores[level.concurrency] = cores

    def rate(self, concurrency: int) -> float | None:
        level = self.levels.get(concurrency)
        return level.tokens_per_second if level else None


class EngineRow(msgspec.Struct, kw_only=True):
    """An engine without a server, in a process of its own; the best of all rounds."""

    name: str
    levels: dict[int, Figures] = {}
    failure: str = ""

    def add(self, figures: Figures) -> None:
        best = self.levels.get(figures.concurrency)
        if best is None or figures.tokens_per_second > best.tokens_per_second:
            self.levels[figures.concurrency] = figures

    def rate(self, concurrency: int) -> float | None:
        figures = self.levels.get(concurrency)
        return figures.tokens_per_second if figures else None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one run. ``rows`` begin with Headrace, ``engines`` with its fastest way."""

    date: str
    machine: Machine
    model: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    concurrency: list[int]
    busy_before: float
    """Cores that others used before the run: from a tenth on the figures are worth little."""
    rows: list[Row]
    engines: list[EngineRow]
    absent: list[str]


def write_json(comparison: Comparison, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(comparison), indent=2) + b"\n")


def put_into(readme: Path, text: str) -> None:
    """Replace what stands between the two marks of a document.

    Raises: ValueError when it has no such marks.
    """
    before, begin, rest = readme.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{readme} has no lines {_BEGIN} and {_END}")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def markdown(comparison: Comparison) -> str:
    """The tables, and what was measured."""
    c = comparison
    caption = (
        f"{c.model}, prompts of {c.prompt_tokens} tokens, {c.new_tokens} new tokens, greedy, "
        f"streamed over HTTP; output tokens per second by number of clients. Best of {c.rounds} "
        f"rounds on {c.date}, {c.machine}."
    )
    parts = [caption, _servers(c), _engines(c), _scenarios(c)]
    if c.absent:
        parts.append(f"Not installed there: {', '.join(c.absent)}.")
    return "\n\n".join(part for part in parts if part)


def _servers(c: Comparison) -> str:
    heads = ["server", *map(str, c.concurrency), f"first token at {_AT}", f"gap at {_AT}", "memory"]
    rows = [
        [
            f"{row.name} {row.version}".strip(),
            *(_rate(row.rate(count)) for count in c.concurrency),
            _ms(level.first_token_ms.p50) if level and level.first_token_ms else "–",
            _spread(level.gap_ms) if level else "–",
            _memory(row),
        ]
        for row in c.rows
        for level in [row.levels.get(_AT)]
    ]
    return _table(heads, rows) + (
        "\n\nFirst token: p50. Gap between two tokens of a stream: p50 / p99. Memory: resident, of "
        "all processes."
    )


def _engines(c: Comparison) -> str:
    if not c.engines:
        return ""
    heads = ["engine alone, in process", *map(str, c.concurrency), f"first token at {_AT}"]
    rows = [
        [
            row.name,
            *(_rate(row.rate(count)) for count in c.concurrency),
            _ms(figures.time_to_first_token_p50) if figures else "–",
        ]
        for row in c.engines
        for figures in [row.levels.get(_AT)]
    ]
    ours, alone = c.rows[0], c.engines[0]
    over_http = [
        f"{rate / engine:.0%} at {count}"
        for count in c.concurrency
        if (rate := ours.rate(count)) and (engine := alone.rate(count))
    ]
    return _table(heads, rows) + f"\n\nOver HTTP Headrace keeps of it: {', '.join(over_http)}."


def _scenarios(c: Comparison) -> str:
    rows = [
        [
            row.name,
            _spread(s.crowded_gap_ms),
            f"{s.shared_prefix_ratio:.2f}" if s.shared_prefix_ratio is not None else "–",
            _spread(s.short_context_gap_ms),
            _spread(s.long_context_gap_ms),
        ]
        for row in c.rows
        if (s := row.scenarios)
    ]
    if not rows:
        return ""
    heads = [
        "8 streams, gap p50 / p99",
        "while a 512-token prompt comes each second",
        "shared 512-token prefix: second first token / first",
        f"behind {c.prompt_tokens} tokens",
        "behind 2,048 tokens",
    ]
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _rate(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:,.0f}"


def _ms(value: float) -> str:
    return f"{value:,.1f} ms" if value < 10 else f"{value:,.0f} ms"


def _spread(spread: Spread | None) -> str:
    return "–" if spread is None else f"{_ms(spread.p50)[:-3]} / {_ms(spread.p99)}"


def _memory(row: Row) -> str:
    if not row.rss_bytes:
        return "–"
    total = f"{sum(row.rss_bytes.values()) / 2**30:.1f} GiB"
    worker = row.rss_bytes.get("workers")
    return f"{total}, worker {worker / 2**30:.1f}" if worker else total
