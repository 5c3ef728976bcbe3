"""The report of an incident in a real browser: from disk, alone, and on paper."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from playwright.async_api import Browser

from ops.cli import cli
from tests.support.simulated_logs import Pool, write

pytestmark = pytest.mark.asyncio(loop_scope="session")


def _report(folder: Path) -> tuple[Path, str]:
    """A report of a slow worker, and that worker's name."""
    pool = Pool(seed=41, seconds=240, rate=10)
    pool.event(118, "deploy.started", "supervisor", "s1", what="model_version", from_version="v1",
               to_version="v2")  # fmt: skip
    pool.workers[2].slow = lambda t: 6.0 if t > 120 else 1.0
    path = write(pool.lines(), folder / "pool.jsonl.gz")
    line = ["incident", "report", "--logs", str(path), "-o", str(folder / "report.html")]
    answer = CliRunner().invoke(cli, line, standalone_mode=False)
    assert answer.return_value == 1, answer.output
    return folder / "report.html", pool.workers[2].name


async def test_a_report_opens_from_disk_alone_and_shows_its_facts(
    chromium: Browser, tmp_path: Path
) -> None:
    """No request but for the file, no complaint, the cause in sight, nothing beyond the edge."""
    path, worker = _report(tmp_path)
    page = await chromium.new_page(viewport={"width": 1100, "height": 900})
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    await page.goto(path.as_uri())
    assert asked == [path.as_uri()]
    assert complaints == []
    assert worker in await page.inner_text("h1")
    cause = page.locator("dl.answers .cause")
    box = await cause.bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 900, "the cause is not seen without scrolling"
    for width in (1100, 390):
        await page.set_viewport_size({"width": width, "height": 900})
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
    lines = await page.locator("polyline").count()
    assert lines >= 6
    assert await page.locator("rect.trouble").count() >= 5
    printed = await page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    await page.close()
