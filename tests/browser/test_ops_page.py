"""The operations page as somebody uses it at night: what is wrong, where, and what can be done."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page

from common.broker import Broker, connect
from common.broker.steps import FailureNote
from common.failures import KINDS
from common.models.store import SIMULATED_MODEL, ModelStore
from common.overview import Diagnosis, ErrorCount, LaneView, Requests, encode
from tests.browser.conftest import Door, Site, Visitor
from tests.browser.link import link_to
from tests.support.dead_letters import killed
from tests.support.overviews import overview, worker_view
from tests.support.processes import processes
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="session")

EVERY_S = 0.25
"""Four times as often as an exporter looks, so that tests need not wait."""
WELL = Diagnosis(
    severity="ok",
    what="Everything is well.",
    why="3 workers ready.",
    command="headrace top",
    code="well",
)
GROWS = Diagnosis(
    severity="critical",
    what="Questions come faster than they are answered.",
    why="A new one waits 34 s.",
    command="headrace worker",
    code="queue_grows",
)
ERRORS_AT = {130.0: [ErrorCount(code="NAN_LOGITS", count_1m=2, total=2)]}
HIDE = """isHidden => {
    Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange", { bubbles: true }));
}"""


@dataclass
class Pool:
    """What stands in for the exporter: tells overviews, each with what the test says is so."""

    broker: Broker
    now: dict[str, Any] = field(default_factory=dict[str, Any])
    is_silent: bool = False

    def tells(self, **changes: Any) -> None:
        """From now on, beside what was said before."""
        self.now |= changes

    async def run(self) -> None:
        while True:
            if not self.is_silent:
                told = {"diagnosis": [WELL], "at": time.time()} | self.now
                await self.broker.overview_store.append(overview(**told))
            await asyncio.sleep(EVERY_S)


@asynccontextmanager
async def pool_on(redis_url: str) -> AsyncGenerator[Pool]:
    broker = Broker(connect(redis_url), SIMULATED_MODEL)
    await broker.load()
    pool = Pool(broker)
    telling = asyncio.create_task(pool.run())
    yield pool
    telling.cancel()
    with suppress(asyncio.CancelledError):
        await telling
    await broker.close()


@pytest_asyncio.fixture(loop_scope="session")
async def pool(site: Site) -> AsyncIterator[Pool]:
    async with pool_on(site.started.redis_url) as pool:
        yield pool


async def at_operations(visitor: Visitor) -> Page:
    await visitor.page.click("header >> text=Live")
    await sees_feed(visitor.page, "live")
    return visitor.page


async def sees_feed(page: Page, state: str) -> None:
    await page.wait_for_selector(f"#feed[data-state={state}]")


async def sees(page: Page, place: str, *texts: str) -> None:
    """Wait until all the texts stand in what ``place`` selects."""
    await page.wait_for_function(
        """([place, texts]) => {
            const shown = document.querySelector(place)?.textContent ?? "";
            return texts.every((text) => shown.includes(text));
        }""",
        arg=[place, list(texts)],
    )


@asynccontextmanager
async def feeds_of(page: Page) -> AsyncGenerator[list[dict[str, str]]]:
    """The headers of each call for the feed from now on."""
    calls: list[dict[str, str]] = []

    async def note(request: Any) -> None:
        if request.url.endswith("/ops/feed"):
            calls.append(await request.all_headers())

    page.on("request", note)
    yield calls
    page.remove_listener("request", note)


async def test_the_banner_says_what_is_wrong_why_and_what_to_run(
    visitor: Visitor, pool: Pool
) -> None:
    """In that order; who listens is told, and the command is one press away."""
    page = await at_operations(visitor)
    await sees(page, "#banner-what", WELL.what)
    assert await page.title() == "Operations – Headrace"
    await visitor.context.grant_permissions(["clipboard-read", "clipboard-write"])
    pool.tells(diagnosis=[GROWS, WELL])
    await page.wait_for_selector("#banner[data-severity=critical]")
    await sees(page, "#banner", GROWS.what, GROWS.why, GROWS.command, WELL.what)
    assert await page.title() == "Critical – Headrace"
    await sees(page, "#announcer", GROWS.what)
    await page.wait_for_selector(".station.queue[data-severity=critical]")
    await page.focus("#banner-command button")
    await page.keyboard.press("Enter")
    await sees(page, "#banner-command", "Copied")
    assert await page.evaluate("navigator.clipboard.readText()") == GROWS.command
    pool.tells(diagnosis=[msgspec.structs.replace(GROWS, severity="warning")])
    await page.wait_for_selector("#banner[data-severity=warning]")
    assert await page.title() == "Warning – Headrace", "the same case, no longer as bad"
    pool.tells(diagnosis=[WELL])
    await page.wait_for_selector("#banner[data-severity=ok]")
    await page.wait_for_selector(".station.queue[data-severity=ok]")


async def test_figures_stand_where_they_are_measured(visitor: Visitor, pool: Pool) -> None:
    """In the picture, in words for who can not see it, in the charts and in the tables."""
    page = await at_operations(visitor)
    pool.tells(
        requests=Requests(per_s=12.5, running=7, failed=3),
        lanes=[LaneView(lane="default", depth=41, oldest_age_s=9.0, est_wait_s=13.0)],
        workers=[
            worker_view("w0", gpu_mem_bytes=61 << 30, gpu_mem_total_bytes=79 << 30),
            worker_view("w1", state="degraded", kv_used=0.9),
        ],
        errors=[
            ErrorCount(code="QUEUE_FULL", count_1m=5, total=9),
            ErrorCount(code="NAN_LOGITS", count_1m=2, total=2),
        ],
        streams=1234,
    )
    await sees(page, ".station.router", "12.5", "Errors/min2", "Rejected/min5", "Running7")
    await sees(page, ".station.queue", "41waiting", "default419 s13 s")
    await sees(page, ".station.workers", "2 workers", "80tokens/s", "8/32 · 40/s", "degraded")
    await sees(page, ".station.stream", "1,234streams", "Relay lag p994 ms", "of its limit10 %")
    await sees(page, ".station.client", "300 msfirst token", "First token p99900 ms")
    await page.click("text=The picture in words")
    await sees(page, "#picture-words", "default: 41 waiting, oldest 9 s, estimated wait 13 s")
    await sees(page, "#picture-words", "w1: degraded, 8 of 32 in the batch, KV cache 90 %")
    await sees(page, "#figures", "Queue time200 ms", "Error rate0 %", "Model versionm@1")
    await sees(
        page, "#workers tbody", "GPU 61 GiB of 79 GiB", "w1degradedm@18 of 3290 %40954 MiB0.5 s ago"
    )
    await sees(page, "#errors tbody", "QUEUE_FULL59", "NAN_LOGITS22")
    await page.locator(".chart", has_text="Waiting, by lane").scroll_into_view_if_needed()
    waiting = page.get_by_role("img", name="Waiting, by lane: default 41")
    await waiting.wait_for()
    assert await waiting.locator("canvas").count() == 1


async def test_what_was_before_is_drawn_as_well(visitor: Visitor, pool: Pool) -> None:
    """The gateway remembers minutes: who opens the page late sees how it came to this."""
    page = await at_operations(visitor)
    first = await page.evaluate("performance.timeOrigin / 1000")
    pool.tells(streams=77)
    await sees(page, ".station.stream", "77streams")
    await page.reload()
    await sees_feed(page, "live")
    oldest = await page.evaluate("""async () => {
        const { History } = await import("/ui/ops/history.js");
        const { followFeed } = await import("/ui/headrace.js");
        const [history, end] = [new History(), new AbortController()];
        await followFeed({
            signal: end.signal,
            onHistory: (columns) => history.replace(columns),
            onOverview: (overview) => { history.add(overview); end.abort("seen"); },
        }).catch(() => {});
        return history.times[0];
    }""")
    assert oldest < first + 5


async def test_a_chart_invents_nothing(visitor: Visitor) -> None:
    """Where nothing is known there is a hole; what is too old goes; a clock may be set back."""
    seconds = [100.0, 101.0, 130.0, 131.0, 130.5, 1029.0]
    told = [json.loads(encode(overview(at=at, errors=ERRORS_AT.get(at, [])))) for at in seconds]
    times, failed, errors = await visitor.page.evaluate(
        """async (told) => {
            const { History } = await import("/ui/ops/history.js");
            const history = new History();
            const seen = told.map((overview) => {
                history.add(overview);
                return [...history.times];
            });
            return [seen, history.column("requests.failed"), history.column("errors.NAN_LOGITS")];
        }""",
        told,
    )
    assert times[3] == [100, 101, 102, 130, 131]
    assert times[4] == [100, 101, 102, 130, 130.5]
    assert times[5] == [130, 130.5, 131.5, 1029]
    assert failed == [1, 1, None, 1]
    assert errors == [2, 0, None, 0], "no longer told of is none, not unknown"


@pytest.mark.usefixtures("pool")
async def test_a_restarted_gateway_is_resumed_without_a_gap(site: Site, door: Door) -> None:
    """By itself, behind the last second that was seen; what is old does not look like now."""
    gateway = await site.new_gateway()
    async with link_to(gateway.url) as link:
        visitor = await Door(door.chromium, link.url, door.contexts).enter()
        visitor.expected += ["net::ERR_"]
        page = await at_operations(visitor)
        async with feeds_of(page) as calls:
            gateway.kill()
            await sees_feed(page, "lost")
            assert await page.evaluate("document.body.classList.contains('is-old')")
            await sees(page, "#banner", "lost its connection", "headrace status")
            link.lead_to((await site.new_gateway()).url)
            await sees_feed(page, "live")
            assert not await page.evaluate("document.body.classList.contains('is-old')")
            await wait_until(lambda: bool(calls), what="a call for the feed")
        assert all(call.get("last-event-id") for call in calls)
        visitor.check_quiet()


async def test_silence_is_said(visitor: Visitor, pool: Pool) -> None:
    """The connection stands, but nobody looks at the pool any more."""
    page = await at_operations(visitor)
    pool.is_silent = True
    await sees_feed(page, "stale")
    await sees(page, "#feed", "Nothing new for 6 s", "Shown is")
    said = await page.locator("#announcer > p").all_inner_texts()
    assert len([text for text in said if "Nothing new" in text]) == 1, "its seconds are not told"
    await sees(page, "#banner", "This picture is old")
    pool.is_silent = False
    await sees_feed(page, "live")
    await sees(page, "#banner", WELL.what)


async def test_a_hidden_tab_costs_nothing(visitor: Visitor, pool: Pool) -> None:
    """Its connection is closed; once it is seen again, it goes on where it was."""
    page = await at_operations(visitor)
    async with feeds_of(page) as calls:
        async with page.expect_event("requestfailed", lambda call: call.url.endswith("/ops/feed")):
            await page.evaluate(HIDE, True)
        pool.tells(streams=4321)
        assert calls == []
        await page.evaluate(HIDE, False)
        await sees(page, ".station.stream", "4,321streams")
        await wait_until(lambda: bool(calls), what="a call for the feed")
    assert [bool(call.get("last-event-id")) for call in calls] == [True]


async def test_rows_stay_where_they_are_while_figures_change(visitor: Visitor, pool: Pool) -> None:
    """What has the focus keeps it, through changes above it; where its row goes, so does it."""
    page = await at_operations(visitor)
    await sees(page, "#workers tbody", "w0", "w1", "w2")
    await page.focus("#workers tr:nth-child(2) button")
    assert await page.evaluate("document.activeElement.ariaLabel") == "Drain worker w1"
    pool.tells(workers=[worker_view("new"), worker_view("w1", kv_used=0.5), worker_view("w2")])
    await sees(page, "#workers tbody", "new", "50 %")
    assert await page.evaluate("document.activeElement.ariaLabel") == "Drain worker w1"
    pool.tells(workers=[worker_view("new")])
    await page.wait_for_selector("#workers tbody tr:only-child")
    assert await page.evaluate("document.activeElement.id") == "workers-title"


async def test_a_worker_is_drained_and_resumed_after_a_question(
    site: Site, visitor: Visitor, pool: Pool
) -> None:
    """A real one: it rests, and works again; who says no in the question changes nothing."""
    worker = await site.started.worker(**site.settings).ready()
    page = await at_operations(visitor)
    pool.tells(workers=[worker_view(worker.name, held=2)])
    await page.focus(f"button[aria-label='Drain worker {worker.name}']")
    await page.keyboard.press("Enter")
    await sees(page, "#question[open]", f"Drain worker {worker.name}?", "2 generations")
    await page.keyboard.press("Escape")
    await page.wait_for_selector("#question", state="hidden")
    assert await page.evaluate("document.activeElement.textContent") == "Drain"
    await page.keyboard.press("Enter")
    await page.click("#question >> button:text-is('Drain')")
    await worker.saw("worker.state", to="drained")
    await sees(page, "#announcer", f"Worker {worker.name} is drained.")
    pool.tells(workers=[worker_view(worker.name, state="drained")])
    await page.click("button:text-is('Resume')")
    await page.click("#question >> button:text-is('Resume')")
    await worker.saw("worker.state", to="ready", cause="resumed")
    worker.terminate()
    await worker.ended()


async def test_an_action_that_is_refused_says_why(visitor: Visitor, pool: Pool) -> None:
    visitor.expected += ["404"]
    page = await at_operations(visitor)
    pool.tells(workers=[worker_view("gone")])
    await page.click("button[aria-label='Drain worker gone']")
    await page.click("#question >> button:text-is('Drain')")
    await sees(page, "#problem", "There is no worker gone alive", "NOT_FOUND")


async def test_an_error_opens_the_requests_that_ended_with_it(visitor: Visitor, pool: Pool) -> None:
    """Each with the command that tells its story."""
    note = FailureNote(code="NAN_LOGITS", request_id="feedc0de", at=time.time(), worker="w7")
    await pool.broker.keep_failures([note])
    page = await at_operations(visitor)
    pool.tells(errors=[ErrorCount(code="NAN_LOGITS", count_1m=1, total=1)])
    await page.click("button[aria-label='Show requests with NAN_LOGITS']")
    await sees(page, "#details[open]", KINDS["NAN_LOGITS"].meaning, "headrace explain NAN_LOGITS")
    await sees(page, "#details[open]", "worker w7", "headrace incident show feedc0de")
    await page.keyboard.press("Escape")
    await page.wait_for_selector("#details", state="hidden")
    assert await page.evaluate("document.activeElement.textContent") == "Show"


async def test_dead_letters_are_inspected_requeued_and_discarded(
    door: Door, tmp_path: Path
) -> None:
    """Here of a pool of its own, in which nobody else takes what is asked."""
    ModelStore(tmp_path / "data").add("simulated")
    with RedisServer("valkey", tmp_path / "valkey") as server:
        async with pool_on(server.url) as pool:
            letters = [await killed(pool.broker) for _ in range(2)]
            with processes(server.url, tmp_path) as started:
                settings: dict[str, Any] = {"data_dir": tmp_path / "data", "model": "simulated"}
                gateway = await started.gateway(**settings).ready()
                visitor = await Door(door.chromium, gateway.url, door.contexts).enter()
                await use_dead_letters(visitor, pool, [letter.id for letter in letters])
                visitor.check_quiet()


async def use_dead_letters(visitor: Visitor, pool: Pool, ids: list[str]) -> None:
    pool.tells(dead_letters=2)
    page = await at_operations(visitor)
    await sees(page, "#dead tbody", *ids)
    await page.click(f"button[aria-label='Inspect {ids[0]}']")
    await sees(page, "#details[open]", f"headrace incident show {ids[0][:-2]}", "max new tokens")
    await page.click("#details >> text=Close")
    await page.click(f"button[aria-label='Requeue {ids[0]}']")
    await page.click("#question >> button:text-is('Requeue')")
    await sees(page, "#announcer", f"Request {ids[0]} is asked anew as ")
    await page.wait_for_selector(f"#dead :text('{ids[0]}')", state="detached")
    await page.click(f"button[aria-label='Discard {ids[1]}']")
    await page.click("#question >> button:text-is('Discard')")
    await sees(page, "#announcer", f"Request {ids[1]} is discarded.")
    pool.tells(dead_letters=0)
    await sees(page, "#dead", "Nothing was set aside.")
    assert await pool.broker.dead_letter_store.newest() == []


@pytest.mark.usefixtures("pool")
async def test_live_streams_are_listed_while_somebody_looks(site: Site, visitor: Visitor) -> None:
    page = await at_operations(visitor)
    await sees(page, "#workers tbody", "w0", "w1", "w2")
    await page.evaluate("scrollTo(0, document.body.scrollHeight)")
    async with httpx.AsyncClient(base_url=site.gateway.url, timeout=60) as client:
        body = {"prompt": "hello", "max_tokens": 2000, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            id = answer.headers["x-headrace-stream-id"]
            await sees(page, "#streams tbody", id, site.worker.name)
        await client.delete(f"/v1/streams/{id}")
    await page.wait_for_selector(f"#streams :text('{id}')", state="detached")


@pytest.mark.usefixtures("pool")
async def test_where_a_key_is_needed_the_page_asks_for_it(site: Site, chromium: Browser) -> None:
    gateway = await site.new_gateway(api_key="let-me-in")
    async with await chromium.new_context() as context:
        page = await context.new_page()
        await page.goto(f"{gateway.url}/ops/")
        await page.wait_for_selector("#api-key:focus")
        await page.keyboard.type("let-me-in")
        await page.keyboard.press("Tab")
        await sees_feed(page, "live")
        await page.wait_for_selector("#problem", state="hidden")
        await sees(page, "#banner-what", WELL.what)


@pytest.mark.parametrize("width", [320, 800, 1600])
async def test_it_fits_any_screen(door: Door, pool: Pool, width: int) -> None:
    """No sideways scrolling, no text outside of its box, targets for fingers."""
    pool.tells(
        diagnosis=[GROWS, WELL],
        workers=[worker_view(f"w{number:011d}") for number in range(20)],
        streams=10_000,
    )
    is_mobile = width <= 400
    visitor = await door.enter(
        viewport={"width": width, "height": 900}, is_mobile=is_mobile, has_touch=is_mobile
    )
    page = await at_operations(visitor)
    await page.wait_for_function("document.querySelectorAll('.tile').length === 20")
    assert await page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    ) == 0  # fmt: skip
    outside = await page.evaluate("""() => [...document.querySelectorAll(".station")]
        .flatMap((station) => {
            const frame = station.querySelector(".frame").getBoundingClientRect();
            return [...station.querySelectorAll("text, .tile-frame")].filter((part) => {
                const { left, right, bottom } = part.getBoundingClientRect();
                return left < frame.left || right > frame.right || bottom > frame.bottom;
            }).map((part) => part.textContent);
        })""")
    assert outside == []
    if is_mobile:
        heights = await page.evaluate("""() =>
            [...document.querySelectorAll("main button, a.quiet-button, summary")]
                .map((target) => target.getBoundingClientRect().height).filter(Boolean)""")
        assert min(heights) >= 36
