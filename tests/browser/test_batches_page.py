"""The page of batches as somebody uses it: handing over a file, watching, cancelling, fetching."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Browser, Page

from tests.browser.conftest import Door, Site, Visitor
from tests.browser.link import Link
from tests.support.batches import jsonl, line
from tests.support.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="session")

DROP = """([name, text]) => {
    const files = new DataTransfer();
    files.items.add(new File([text], name));
    const send = (type) => document.getElementById("drop").dispatchEvent(
        new DragEvent(type, { dataTransfer: files, bubbles: true, cancelable: true }));
    send("dragenter");
    const isMarked = document.getElementById("drop").classList.contains("over");
    return [isMarked, send("dragover"), send("drop")];
}"""


def lines(*bodies: dict[str, Any]) -> str:
    made = (
        line(f"line-{number}", "/v1/completions", model="simulated", **body)
        for number, body in enumerate(bodies)
    )
    return jsonl(made).decode()


def saying(num_tokens: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{number}. hello", "max_tokens": num_tokens} for number in range(count)]


async def at_batches(visitor: Visitor) -> Page:
    await visitor.page.click("text=Batches")
    await visitor.page.wait_for_selector("#batches:not([aria-busy])", state="attached")
    return visitor.page


async def hand_over(page: Page, folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    await page.set_input_files("#file", path)


def card(name: str, state: str = "") -> str:
    return f".batch:has(h3:text-is({name!r}))" + (
        f":has(.batch-state:text-is({state!r}))" if state else ""
    )


async def download(page: Page, name: str, link: str) -> str:
    async with page.expect_download() as started:
        await page.click(f"{card(name)} a:text-is({link!r})")
    path = await (await started.value).path()
    return path.read_text()


async def test_a_file_is_handed_over_and_its_answers_fetched(
    visitor: Visitor, tmp_path: Path
) -> None:
    """Under its own name; failed lines come in a file of their own."""
    page = await at_batches(visitor)
    bad = {"prompt": "x", "max_tokens": -1}
    await hand_over(page, tmp_path, "one.jsonl", lines(*saying(3, 20), bad))
    await page.wait_for_selector(card("one.jsonl", "Done"))
    figures = await page.inner_text(f"{card('one.jsonl')} .batch-figures")
    assert figures.startswith("21 of 21 lines · 1 failed · ")
    answers = (await download(page, "one.jsonl", "Answers")).splitlines()
    assert {json.loads(line)["custom_id"] for line in answers} == {f"line-{n}" for n in range(20)}
    assert len(answers) == 20
    errors = (await download(page, "one.jsonl", "Errors")).splitlines()
    assert [json.loads(line)["custom_id"] for line in errors] == ["line-20"]
    await page.reload()
    await page.wait_for_selector(card("one.jsonl", "Done"))


async def test_a_dropped_file_moves_live_and_can_be_cancelled(visitor: Visitor) -> None:
    """Counts come by the tail, not by asking; what is finished is kept."""
    page = await at_batches(visitor)
    text = lines(*saying(3, 4), *saying(2000, 20))
    assert await page.evaluate(DROP, ["two.jsonl", text]) == [True, False, False]
    await page.wait_for_selector(card("two.jsonl", "Running"))
    await page.wait_for_function(
        """name => [...document.querySelectorAll("progress")].some((bar) =>
            bar.ariaLabel === `Finished lines of ${name}` && bar.value >= 4 && bar.max === 24)""",
        arg="two.jsonl",
    )
    tails = [call.url for call in visitor.calls if "/events?lines=0" in call.url]
    assert len(tails) == 1
    page.once("dialog", lambda dialog: dialog.accept())
    await page.focus(f"{card('two.jsonl')} button")
    await page.keyboard.press("Enter")
    await page.wait_for_selector(card("two.jsonl", "Cancelled"))
    assert await page.evaluate("document.activeElement.id") == "batches-title"
    kept = (await download(page, "two.jsonl", "Answers")).splitlines()
    assert len(kept) >= 4
    said = await page.locator("#announcer > p").all_inner_texts()
    assert said[0] == "two.jsonl is handed over."
    assert said[-1].startswith("two.jsonl: cancelled, ")


async def test_a_refused_file_says_why_line_by_line(visitor: Visitor, tmp_path: Path) -> None:
    page = await at_batches(visitor)
    await hand_over(page, tmp_path, "three.jsonl", lines(*saying(3, 1)) + "no json\n")
    await page.wait_for_selector(card("three.jsonl", "Refused"))
    assert (await page.inner_text(f"{card('three.jsonl')} .batch-errors")).startswith("Line 2: ")
    await hand_over(page, tmp_path, "four.txt", "not a request\n")
    await page.wait_for_selector("#problem :text('four.txt is no request')")
    assert await page.locator(card("four.txt")).count() == 0


async def test_a_lost_connection_is_said_and_resumed(
    visitor: Visitor, link: Link, tmp_path: Path
) -> None:
    visitor.expected += ["net::ERR_"]
    page = await at_batches(visitor)
    await hand_over(page, tmp_path, "five.jsonl", lines(*saying(400, 24)))
    await page.wait_for_selector(card("five.jsonl", "Running"))
    link.cut()
    await page.wait_for_selector(f"{card('five.jsonl')} :text('connection lost')")
    await wait_until(lambda: link.num_refused >= 2, what="a second attempt to come back")
    link.heal()
    await page.wait_for_selector(card("five.jsonl", "Done"))
    assert await page.locator("#problem:visible").count() == 0


async def test_where_a_key_is_needed_the_page_asks_for_it(
    site: Site, chromium: Browser, tmp_path: Path
) -> None:
    """And fetches files with it, which a plain link could not."""
    gateway = await site.new_gateway(api_key="let-me-in")
    async with await chromium.new_context() as context:
        page = await context.new_page()
        await page.goto(f"{gateway.url}/ui/batches.html")
        await page.wait_for_selector("#api-key:focus")
        await page.keyboard.type("let-me-in")
        await page.keyboard.press("Tab")
        await page.wait_for_selector("#problem", state="hidden")
        await hand_over(page, tmp_path, "six.jsonl", lines(*saying(3, 2)))
        await page.wait_for_selector(card("six.jsonl", "Done"))
        fetched = await download(page, "six.jsonl", "Answers")
    async with httpx.AsyncClient(base_url=site.gateway.url) as client:
        newest = (await client.get("/v1/batches?limit=1")).json()["data"][0]
        content = await client.get(f"/v1/files/{newest['output_file_id']}/content")
    assert fetched == content.text


async def test_it_fits_a_phone_and_a_keyboard(door: Door, tmp_path: Path) -> None:
    """No sideways scrolling, targets for fingers; each control is reached, named and marked."""
    visitor = await door.enter(
        viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True
    )
    page = await at_batches(visitor)
    name = f"{'an-unbroken-name-' * 8}.jsonl"
    await hand_over(page, tmp_path, name, lines(*saying(3, 2)))
    await page.wait_for_selector(card(name, "Done"))
    assert await page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    ) == 0  # fmt: skip
    heights = await page.evaluate("""() =>
        [...document.querySelectorAll("button, a.quiet-button, summary, .drop")]
            .map((target) => target.getBoundingClientRect().height).filter(Boolean)""")
    assert min(heights) >= 36
    await page.focus(".skip-link")
    reached: list[str] = []
    for _ in range(5):
        await page.keyboard.press("Tab")
        told = await page.evaluate("""() => {
            const { activeElement: active } = document;
            const marked = active.id === "file" ? document.getElementById("drop") : active;
            const name = active.labels?.[0]?.innerText ?? active.ariaLabel ?? active.innerText;
            return [name, getComputedStyle(marked).outlineStyle];
        }""")
        assert told[1] != "none", f"{told[0]} shows no focus"
        reached.append(told[0])
    assert reached[:2] == ["Chat", "Live"]
    assert reached[2].startswith("Choose a file or drop it here")
    assert reached[3].startswith("Answers of an-unbroken-name-")
