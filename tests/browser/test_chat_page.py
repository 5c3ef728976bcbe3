"""The page as somebody uses it: asking, reading, stopping, and going on from where it was."""

import httpx
import pytest
from playwright.async_api import Browser

from tests.browser.conftest import INTER_TOKEN_MS, Door, Site, Visitor
from tests.browser.link import Link
from tests.support.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="session")

FIGURES = {"Queue time", "Time to first token", "Tokens per second", "Model version"}


async def test_a_message_streams(site: Site, visitor: Visitor) -> None:
    """Text grows while it is made; at the end it is the model's answer, with its figures."""
    expected = await site.answer_to("hello", max_tokens=120)
    await visitor.choose(max_tokens=120)
    await visitor.ask("hello")
    await visitor.sees_text(5)
    first = await visitor.text()
    figures = await visitor.sees_end()
    assert len(first) < len(expected)
    assert expected.startswith(first)
    assert await visitor.text() == expected
    assert set(figures) == FIGURES
    assert figures["Model version"].startswith("simulated@")
    assert 0 < float(figures["Tokens per second"]) <= 1000 / INTER_TOKEN_MS


async def test_the_model_is_told_the_conversation(site: Site, visitor: Visitor) -> None:
    """The second answer depends on the first exchange and on the system prompt."""
    await visitor.choose(max_tokens=30)
    await visitor.ask("hello")
    await visitor.sees_end()
    first = await visitor.text()
    await visitor.page.click("#settings summary")
    await visitor.page.fill("#system-prompt", "Be brief.")
    await visitor.ask("go on")
    await visitor.page.wait_for_selector(".answer:nth-child(4) > .stats:not([hidden])")
    sent = visitor.calls[-1].post_data_json or {}
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "go on"},
    ]


async def test_a_reload_in_mid_answer_continues_it(site: Site, visitor: Visitor) -> None:
    """Nothing is lost, nothing is repeated, nothing is asked twice."""
    expected = await site.answer_to("hello", max_tokens=200)
    await visitor.choose(max_tokens=200)
    await visitor.ask("hello")
    await visitor.sees_text(20)
    for _ in range(3):
        length = len(await visitor.text())
        await visitor.page.reload()
        await visitor.sees_text(length + 10)
    await visitor.sees_end()
    assert await visitor.text() == expected
    posts = [call for call in visitor.calls if call.method == "POST"]
    resumes = [call for call in visitor.calls if "/v1/streams/" in call.url]
    assert (len(posts), len(resumes)) == (1, 3)
    assert all("after=" in call.url for call in resumes)


async def test_a_reload_in_the_queue_keeps_the_place(site: Site, visitor: Visitor) -> None:
    """Before the first token the page says that it waits, and goes on waiting after a reload."""
    expected = await site.answer_to("hello", max_tokens=40)
    await visitor.choose(max_tokens=40)
    site.worker.pause()
    try:
        await visitor.ask("hello")
        await visitor.sees("Waiting in the queue")
        await visitor.page.reload()
        await visitor.sees("Waiting in the queue")
    finally:
        site.worker.resume()
    await visitor.sees_end()
    assert await visitor.text() == expected
    assert [call.method for call in visitor.calls if call.method == "POST"] == ["POST"]


async def test_who_waits_is_told_how_many_are_ahead(site: Site, visitor: Visitor) -> None:
    await visitor.choose(max_tokens=20)
    site.worker.pause()
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 20}}
    try:
        async with (
            httpx.AsyncClient(base_url=site.gateway.url, timeout=30) as client,
            client.stream("POST", "/generate_stream", json=body) as other,
        ):
            assert other.status_code == 200
            await visitor.ask("hello")
            await visitor.sees("Waiting in the queue, 1 ahead")
    finally:
        site.worker.resume()
    await visitor.sees_end()


async def test_a_closed_tab_is_taken_up_by_the_next_one(site: Site, visitor: Visitor) -> None:
    """The conversation belongs to the browser, not to the tab."""
    expected = await site.answer_to("hello", max_tokens=150)
    await visitor.choose(max_tokens=150)
    await visitor.ask("hello")
    await visitor.sees_text(20)
    await visitor.close()
    await visitor.open()
    await visitor.sees_end()
    assert await visitor.text() == expected


async def test_a_second_tab_has_a_conversation_of_its_own(visitor: Visitor) -> None:
    """Two tabs do not overwrite one another, not even after a reload."""
    await visitor.choose(max_tokens=10)
    await visitor.ask("first tab")
    await visitor.sees_end()
    first_page = visitor.page
    await visitor.open()
    assert await visitor.page.is_visible("#welcome")
    await visitor.ask("second tab")
    await visitor.sees_end()
    for page, text in ((first_page, "first tab"), (visitor.page, "second tab")):
        await page.reload()
        await page.wait_for_selector(".question")
        assert await page.inner_text(".question > .text") == text
        assert await page.locator(".question").count() == 1


async def test_stop_stops_it(site: Site, visitor: Visitor) -> None:
    """The generation itself ends, and the page shows what was made until then."""
    await visitor.choose(max_tokens=2000)
    await visitor.ask("hello")
    await visitor.sees_text(20)
    await visitor.page.click("#stop")
    await visitor.sees("Stopped.")
    assert set(await visitor.sees_end()) >= FIGURES
    (turn,) = [turn for turn in await visitor.stored_turns() if turn["role"] == "assistant"]
    frames = await site.stream(turn["progress"]["id"])
    assert '"finish_reason":"cancelled"' in frames.replace(" ", "")
    assert (await visitor.text()).strip() == turn["progress"]["text"].strip()
    assert await visitor.page.is_visible("#send")


async def test_a_stop_outlives_a_reload(site: Site, visitor: Visitor) -> None:
    """The page is left before the gateway could be told: it is told afterwards."""
    visitor.expected += ["net::ERR_FAILED"]
    streams = f"{visitor.url}/v1/streams/*"
    await visitor.choose(max_tokens=2000)
    await visitor.ask("hello")
    await visitor.sees_text(20)
    await visitor.page.route(streams, lambda route: route.abort())
    await visitor.page.keyboard.press("Escape")
    await visitor.sees("Stopping…")
    await visitor.page.unroute(streams)
    await visitor.page.reload()
    await visitor.sees("Stopped.")
    stream_id = (await visitor.stored_turns())[-1]["progress"]["id"]
    assert '"finish_reason":"cancelled"' in (await site.stream(stream_id)).replace(" ", "")


async def test_a_dropped_connection_is_resumed(site: Site, visitor: Visitor, link: Link) -> None:
    """The page says that the connection is lost, tries again, and misses nothing."""
    visitor.expected += ["net::ERR_"]
    expected = await site.answer_to("hello", max_tokens=200)
    await visitor.choose(max_tokens=200)
    await visitor.ask("hello")
    await visitor.sees_text(20)
    link.cut()
    await visitor.sees("Connection lost, resuming…")
    await wait_until(lambda: link.num_refused >= 2, what="a second attempt to come back")
    link.heal()
    await visitor.sees_end()
    assert await visitor.text() == expected
    assert await visitor.page.locator(".activity:visible").count() == 0


async def test_another_gateway_continues(site: Site, visitor: Visitor, link: Link) -> None:
    """The gateway is killed in mid-answer; the one that the address leads to now has the rest."""
    visitor.expected += ["net::ERR_"]
    expected = await site.answer_to("hello", max_tokens=200)
    doomed = await site.new_gateway()
    link.lead_to(doomed.url)
    await visitor.page.reload()
    await visitor.choose(max_tokens=200)
    await visitor.ask("hello")
    await visitor.sees_text(20)
    doomed.kill()
    link.lead_to(site.gateway.url)
    await visitor.sees_end()
    assert await visitor.text() == expected


async def test_a_worker_dies_and_the_page_says_who_went_on(site: Site, visitor: Visitor) -> None:
    """The same text as ever, and a word about it under the answer."""
    expected = await site.answer_to("hello", max_tokens=200)
    await visitor.choose(max_tokens=200)
    await visitor.ask("hello")
    await visitor.sees_text(20)
    await site.replace_worker()
    figures = await visitor.sees_end()
    assert await visitor.text() == expected
    assert figures["Attempts: 2"] == "Continued by another worker"


async def test_a_refusal_is_said_in_plain_words(site: Site, visitor: Visitor, link: Link) -> None:
    """With its code, with when to come back, and with a button that asks again."""
    visitor.expected += ["429"]
    full = await site.new_gateway(lane_cap_tokens=1)
    link.lead_to(full.url)
    await visitor.page.reload()
    await visitor.choose(max_tokens=20)
    await visitor.ask("hello")
    await visitor.sees("More people are asking than can be answered in time.")
    await visitor.sees("QUEUE_FULL")
    link.lead_to(site.gateway.url)
    await visitor.page.click("text=Try again")
    await visitor.sees_end()
    assert await visitor.text() == await site.answer_to("hello", max_tokens=20)
    assert await visitor.page.locator(".answer").count() == 1


async def test_an_answer_that_is_gone_is_said_to_be_gone(visitor: Visitor) -> None:
    """What had arrived stays; the page does not pretend that there was no more."""
    visitor.expected += ["404", "410"]
    await visitor.choose(max_tokens=2000)
    await visitor.ask("hello")
    await visitor.sees_text(20)
    await visitor.page.evaluate("""() => {
        addEventListener("pagehide", () => {
            const turns = JSON.parse(localStorage.getItem("headrace.chat"));
            turns.at(-1).progress.id = "0".repeat(32);
            localStorage.setItem("headrace.chat", JSON.stringify(turns));
        });
    }""")
    await visitor.page.reload()
    await visitor.sees("This answer is no longer kept on the server.")
    await visitor.sees("STREAM_EXPIRED")
    assert len(await visitor.text()) >= 20


async def test_a_new_chat_ends_the_old_one(site: Site, visitor: Visitor) -> None:
    """Its generation is cancelled, its text is gone from the page and from memory."""
    await visitor.choose(max_tokens=2000)
    await visitor.ask("hello")
    await visitor.sees_text(10)
    stream_id = (await visitor.stored_turns())[-1]["progress"]["id"]
    await visitor.page.click("#new-chat")
    assert await visitor.page.locator(".turn").count() == 0
    assert await visitor.stored_turns() == []
    assert '"finish_reason":"cancelled"' in (await site.stream(stream_id)).replace(" ", "")
    await visitor.page.reload()
    assert await visitor.page.is_visible("#welcome")


async def test_it_works_by_keyboard_alone(visitor: Visitor) -> None:
    """Enter sends, Shift+Enter starts a line, Esc stops, and the focus is never lost."""
    keyboard, page = visitor.page.keyboard, visitor.page
    assert await focused(visitor) == "prompt"
    await keyboard.type("two")
    await keyboard.press("Shift+Enter")
    await keyboard.type("lines")
    await keyboard.press("Enter")
    assert await page.inner_text(".question > .text") == "two\nlines"
    await visitor.sees_text(10)
    await keyboard.type("a draft")
    await keyboard.press("Enter")
    assert await page.locator(".question").count() == 1, "one answer at a time"
    await keyboard.press("Escape")
    await visitor.sees("Stopped.")
    assert await focused(visitor) == "prompt"
    assert await page.input_value("#prompt") == "a draft"
    await keyboard.press("Tab")
    assert await focused(visitor) == "send"
    await keyboard.press("Enter")
    await page.wait_for_selector(".answer:nth-child(4)")
    await keyboard.press("Tab")
    assert await focused(visitor) == "stop"
    await keyboard.press("Enter")
    await visitor.sees("Stopped.")
    assert await focused(visitor) == "prompt"


async def test_every_control_can_be_reached_and_seen_by_tab(visitor: Visitor) -> None:
    """In reading order, each with a visible mark of focus."""
    await visitor.choose(max_tokens=5)
    await visitor.ask("hello")
    await visitor.sees_end()
    await visitor.page.click("#settings summary")
    await visitor.page.focus(".skip-link")
    reached: list[str] = []
    for _ in range(9):
        await visitor.page.keyboard.press("Tab")
        reached.append(await focused(visitor))
        assert await visitor.page.evaluate("""() => {
            const marked = document.activeElement.closest(".field:focus-within") ??
                document.activeElement;
            return getComputedStyle(marked).outlineStyle !== "none";
        }"""), f"{reached[-1]} shows no focus"
    assert reached == [
        "quiet-button",
        "quiet-button",
        "new-chat",
        "prompt",
        "send",
        "SUMMARY",
        "temperature",
        "max-tokens",
        "system-prompt",
    ]


async def test_what_happens_is_said_to_screen_readers(visitor: Visitor) -> None:
    """Sentences, not tokens, in a polite region; the answer is marked busy while it grows."""
    await visitor.choose(max_tokens=150)
    await visitor.ask("hello")
    await visitor.sees_text(10)
    assert await visitor.page.get_attribute(".answer", "aria-busy") == "true"
    await visitor.sees_end()
    assert await visitor.page.get_attribute(".answer", "aria-busy") is None
    said = await visitor.page.locator("#announcer > p").all_inner_texts()
    spoken = [line for line in said if not line.endswith("…")]
    assert " ".join(spoken).split() == (await visitor.text()).split()
    assert 1 < len(spoken) < 10


async def test_it_fits_a_phone(door: Door) -> None:
    """No sideways scrolling, nothing that makes a phone zoom in, targets for fingers."""
    visitor = await door.enter(
        viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True
    )
    assert await sideways(visitor) == 0
    await visitor.choose(max_tokens=60)
    await visitor.page.click("#settings summary")
    assert await sideways(visitor) == 0
    await visitor.page.click("#settings summary")
    await visitor.ask("an-unbroken-word-" * 40)
    await visitor.sees_end()
    assert await sideways(visitor) == 0
    sizes = await visitor.page.evaluate("""() =>
        [...document.querySelectorAll("input, textarea")]
            .map((field) => parseFloat(getComputedStyle(field).fontSize))""")
    assert min(sizes) >= 16
    targets = await visitor.page.evaluate("""() =>
        [...document.querySelectorAll("button, summary")]
            .map((target) => target.getBoundingClientRect().height).filter(Boolean)""")
    assert min(targets) >= 36


async def test_where_a_key_is_needed_the_page_asks_for_it(site: Site, chromium: Browser) -> None:
    """At the field for it; the question is answered on the next try, and a reload knows the key."""
    gateway = await site.new_gateway(api_key="let-me-in")
    async with await chromium.new_context() as context:
        page = await context.new_page()
        await page.goto(f"{gateway.url}/ui/")
        await page.fill("#prompt", "hello")
        await page.press("#prompt", "Enter")
        await page.wait_for_selector(".problem :text('API key')")
        await page.wait_for_selector("#api-key:focus")
        await page.keyboard.type("let-me-in")
        await page.keyboard.press("Tab")
        await page.wait_for_selector("#model:not(:empty)")
        await page.fill("#max-tokens", "5")
        await page.click(".problem button")
        await page.wait_for_selector(".answer:last-child > .stats:not([hidden])")
        await page.reload()
        await page.wait_for_selector("#model:not(:empty)")
        stored = await page.evaluate("JSON.stringify(localStorage)")
        assert "let-me-in" not in stored


async def test_reading_back_is_not_interrupted(door: Door) -> None:
    """Who scrolls up while text arrives stays there, and one press leads back to the end."""
    visitor = await door.enter(viewport={"width": 700, "height": 420})
    await visitor.choose(max_tokens=2000)
    await visitor.ask("a long answer, please " * 30)
    await visitor.sees_text(100)
    await visitor.page.mouse.move(300, 200)
    await visitor.page.mouse.wheel(0, -5000)
    await visitor.page.wait_for_selector("#latest:visible")
    length = len(await visitor.text())
    await visitor.sees_text(length + 50)
    assert await visitor.page.evaluate("scrollY") == 0
    await visitor.page.click("#latest")
    await visitor.page.wait_for_selector("#latest", state="hidden")
    await visitor.page.keyboard.press("Escape")
    await visitor.sees("Stopped.")


async def focused(visitor: Visitor) -> str:
    return await visitor.page.evaluate(
        "(({id, className, tagName}) => id || className || tagName)(document.activeElement)"
    )


async def sideways(visitor: Visitor) -> int:
    return await visitor.page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
