"""``headrace.js`` and ``text.js`` by themselves: what a page of somebody else's may rely on."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.browser.conftest import Door, Site, Visitor
from tests.browser.link import Link

pytestmark = pytest.mark.asyncio(loop_scope="session")

PARSE_CUT_ANYWHERE = """async (text) => {
    const { parseEvents } = await import("/ui/headrace.js");
    const bytes = new TextEncoder().encode(text);
    const parse = async (chunks) => {
        async function* arriving() { yield* chunks; }
        const events = [];
        for await (const event of parseEvents(arriving())) events.push(event);
        return JSON.stringify(events);
    };
    const whole = await parse([bytes]);
    const results = new Set([whole, await parse([...bytes].map((byte) => Uint8Array.of(byte)))]);
    for (let cut = 0; cut <= bytes.length; cut++) {
        results.add(await parse([bytes.slice(0, cut), bytes.slice(cut)]));
    }
    return [...results].map((result) => JSON.parse(result));
}"""


STREAMS: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "plain": (
        "id: 1-a\ndata: one\n\nid: 2-b\ndata: two\n\n",
        [("1-a", "message", "one"), ("2-b", "message", "two")],
    ),
    "every kind of line end": (
        "data: a\r\n\r\ndata: b\r\rdata: c\n\n",
        [("", "message", "a"), ("", "message", "b"), ("", "message", "c")],
    ),
    "an id sticks, a comment is nothing": (
        "id: 7\ndata: x\n\n: ping\ndata: y\n\n",
        [("7", "message", "x"), ("7", "message", "y")],
    ),
    "frames without data dispatch nothing": (
        ": ping\n: ping\n\nretry: 500\n\nid: 3\n\ndata: z\n\n",
        [("3", "message", "z")],
    ),
    "byte order mark, event, several lines of data": (
        "\ufeffevent: note\ndata: first\ndata:second\ndata\n\n",
        [("", "note", "first\nsecond\n")],
    ),
    "characters of several bytes, and an event that never ended": (
        "data: crêpes 🛶 水\n\ndata: unfinished",
        [("", "message", "crêpes 🛶 水")],
    ),
}
"""What is received, and the events in it: id, type, data."""

TEXTS = {
    "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "<img src=x onerror=alert(1)>": "<p>&lt;img src=x onerror=alert(1)&gt;</p>",
    "see:\n```js\na < b\n\nc\n```\nend": "<p>see:</p>|a &lt; b\n\nc|<p>end</p>",
    "~~~\n```\n~~~": "|```|",
    "```\nnot closed yet": "|not closed yet|",
    "a `code` word and ``` in a line": "<p>a `code` word and ``` in a line</p>",
    "": "",
}
"""What a model writes, and what stands on the page; ``|`` for the elements around code."""


async def test_events_are_parsed_wherever_the_bytes_are_cut(visitor: Visitor) -> None:
    """By the HTML standard, whole, byte by byte, and cut in two at every place."""
    for name, (text, events) in STREAMS.items():
        results = await visitor.page.evaluate(PARSE_CUT_ANYWHERE, text)
        expected = [dict(zip(("id", "type", "data"), event, strict=True)) for event in events]
        assert results == [expected], name


async def test_an_answer_is_read_from_start_to_end(site: Site, visitor: Visitor) -> None:
    """States in order, pieces that join to the text, and a progress that is plain JSON."""
    seen = await visitor.page.evaluate("""async () => {
        const { streamChat } = await import("/ui/headrace.js");
        const states = [];
        const pieces = [];
        const progress = await streamChat({
            body: { messages: [{ role: "user", content: "hello" }], temperature: 0,
                max_tokens: 30 },
            onState: (state) => states.push(state),
            onText: (piece) => pieces.push(piece),
        });
        return { states, pieces, progress };
    }""")
    assert seen["states"] == ["connecting", "waiting", "streaming"]
    assert "".join(seen["pieces"]) == await site.answer_to("hello", max_tokens=30)
    assert seen["progress"]["text"] == "".join(seen["pieces"])
    assert seen["progress"]["finishReason"] == "length"
    assert seen["progress"]["stats"]["attempts"] == 1


async def test_a_stream_is_resumed_from_any_copy_of_its_progress(
    site: Site, visitor: Visitor
) -> None:
    """Every snapshot leads to the same text, final figures included."""
    results: list[dict[str, Any]] = await visitor.page.evaluate("""async () => {
        const { resume, streamChat } = await import("/ui/headrace.js");
        const copies = [];
        const copy = (_, progress) => copies.push(structuredClone(progress));
        await streamChat({
            body: { messages: [{ role: "user", content: "hello" }], temperature: 0,
                max_tokens: 20 },
            onText: copy,
            onState: (_state, progress) => progress.id && copies.push(structuredClone(progress)),
        });
        return Promise.all(copies.map((progress) => resume({ progress })));
    }""")
    assert len(results) >= 20
    assert {result["text"] for result in results} == {await site.answer_to("hello", max_tokens=20)}
    assert all(result["stats"] and result["finishReason"] == "length" for result in results)


async def test_an_aborted_reader_leaves_the_generation_running(
    site: Site, visitor: Visitor
) -> None:
    """Its own reason is thrown; ``cancel`` is what ends a generation, and may come twice."""
    stream_id = await visitor.page.evaluate("""async () => {
        const { cancel, resume, streamChat } = await import("/ui/headrace.js");
        const abort = new AbortController();
        let kept = null;
        const reason = await streamChat({
            body: { messages: [{ role: "user", content: "hello" }], max_tokens: 2000 },
            headers: { "x-headrace-disconnect": "60" },
            signal: abort.signal,
            onText: (_, progress) => {
                kept = structuredClone(progress);
                abort.abort("enough");
            },
        }).catch((error) => error);
        if (reason !== "enough") throw new Error(`unexpected: ${reason}`);
        await cancel({ id: kept.id });
        await cancel({ id: kept.id });
        await cancel({ id: "0".repeat(32) });
        const rest = await resume({ progress: kept });
        if (rest.finishReason !== "cancelled") throw new Error(rest.finishReason);
        return kept.id;
    }""")
    visitor.expected += ["404"]
    assert '"finish_reason":"cancelled"' in (await site.stream(stream_id)).replace(" ", "")


async def test_the_place_in_the_queue_is_told_to_who_wants_it(site: Site, visitor: Visitor) -> None:
    """While the worker sleeps the request waits, and the page can say for how long."""
    site.worker.pause()
    try:
        await visitor.page.evaluate("""() => {
            window.places = [];
            window.answer = import("/ui/headrace.js").then(({ streamChat }) => streamChat({
                body: { messages: [{ role: "user", content: "hello" }], max_tokens: 5 },
                onPlace: (place) => window.places.push(place),
            }));
        }""")
        await visitor.page.wait_for_function("() => window.places.length > 0")
    finally:
        site.worker.resume()
    answer = await visitor.page.evaluate("() => window.answer")
    assert answer["finishReason"] == "length"
    first = (await visitor.page.evaluate("() => window.places"))[0]
    assert first["isWaiting"]
    assert first["position"] == 0


async def test_a_browsers_event_source_reads_a_stream_with_a_token(
    site: Site, visitor: Visitor, link: Link
) -> None:
    """Where the gateway asks for keys; it reconnects by itself and stops at the end (204)."""
    visitor.expected += ["ERR_"]
    gateway = await site.new_gateway(api_key="secret")
    link.lead_to(gateway.url)
    headers = {"authorization": "Bearer secret", "x-headrace-disconnect": "60"}
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 150}}
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=30) as client:
        async with client.stream("POST", "/generate_stream", json=body) as asked:
            path = f"/v1/streams/{asked.headers['x-headrace-stream-id']}"
        url = (await client.post(f"{path}/token")).json()["url"]
        await visitor.page.evaluate(
            """(url) => {
                window.ids = [];
                window.isClosed = false;
                const source = new EventSource(url);
                source.onmessage = ({ lastEventId }) => window.ids.push(lastEventId);
                source.onerror = () => {
                    window.isClosed = source.readyState === EventSource.CLOSED;
                };
            }""",
            url,
        )
        await visitor.page.wait_for_function("() => window.ids.length > 10")
        link.lead_to(gateway.url)  # breaks what is open
        await visitor.page.wait_for_function("() => window.isClosed")
        whole = (await client.get(path)).text
    ids = [line.removeprefix("id: ") for line in whole.splitlines() if line.startswith("id: ")]
    assert await visitor.page.evaluate("() => window.ids") == ids
    assert len(ids) == 150


async def test_watch_goes_on_where_the_browser_has_given_up(
    site: Site, visitor: Visitor, link: Link
) -> None:
    """A refusal ends an EventSource for ever; the client asks for a new token and reads on."""
    visitor.expected += ["ERR_", "503"]
    gateway, other = [await site.new_gateway(api_key="secret") for _ in range(2)]
    link.lead_to(gateway.url)
    await visitor.page.evaluate("""() => {
        const headers = { authorization: "Bearer secret" };
        window.states = [];
        window.seen = 0;
        window.answer = import("/ui/headrace.js").then(async ({ streamChat, watch }) => {
            const abort = new AbortController();
            let id = "";
            await streamChat({
                headers: { ...headers, "x-headrace-disconnect": "60" },
                body: { messages: [{ role: "user", content: "hello" }], max_tokens: 250,
                    temperature: 0 },
                signal: abort.signal,
                onState: (_state, progress) => { if ((id = progress.id)) abort.abort(); },
            }).catch(() => {});
            return watch({
                id,
                headers,
                onText: (_, { text }) => { window.seen = text.length; },
                onState: (state) => window.states.push(state),
            });
        });
    }""")
    await visitor.page.wait_for_function("() => window.seen > 20")
    async with refusing() as url:
        link.lead_to(url)
        await visitor.page.wait_for_function("() => window.states.includes('reconnecting')")
        await visitor.page.wait_for_function(
            "() => performance.getEntriesByType('resource').some((it) => it.responseStatus === 503)"
        )
        link.lead_to(other.url)
    answer = await visitor.page.evaluate("() => window.answer")
    assert answer["text"] == await site.answer_to("hello", max_tokens=250)
    assert answer["finishReason"] == "length"
    assert (await visitor.page.evaluate("() => window.states"))[0] == "connecting"


async def test_watch_stops_when_its_reader_says_so(site: Site, visitor: Visitor) -> None:
    """With the reason that the reader gave; the generation goes on."""
    outcome = await visitor.page.evaluate("""async () => {
        const { cancel, streamChat, watch } = await import("/ui/headrace.js");
        const [asking, watching] = [new AbortController(), new AbortController()];
        let id = "";
        await streamChat({
            headers: { "x-headrace-disconnect": "60" },
            body: { messages: [{ role: "user", content: "hello" }], max_tokens: 2000 },
            signal: asking.signal,
            onState: (_state, progress) => { if ((id = progress.id)) asking.abort(); },
        }).catch(() => {});
        const reason = await watch({
            id,
            signal: watching.signal,
            onText: () => watching.abort("enough"),
        }).catch((error) => error);
        const late = await watch({ id, signal: watching.signal }).catch((error) => error);
        await cancel({ id });
        const { finishReason } = await watch({ id });
        return { reason, late, finishReason };
    }""")
    assert outcome == {"reason": "enough", "late": "enough", "finishReason": "cancelled"}


@asynccontextmanager
async def refusing() -> AsyncGenerator[str]:
    """What a load balancer answers that has no gateway left; yields its address."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_text_is_shown_as_text(visitor: Visitor) -> None:
    """Paragraphs and fenced code, never markup; and growing ends where showing it at once does."""
    for text, html in TEXTS.items():
        results = await visitor.page.evaluate(
            """async (text) => {
                const { renderText } = await import("/ui/text.js");
                const whole = document.createElement("div");
                const growing = document.createElement("div");
                renderText(whole, text);
                for (let end = 0; end <= text.length; end++) {
                    renderText(growing, text.slice(0, end));
                }
                return [whole.innerHTML, growing.innerHTML];
            }""",
            text,
        )
        assert [_marked(result) for result in results] == [html, html]


async def test_no_script_of_a_message_can_run(door: Door) -> None:
    """The policy that the gateway sends forbids inline scripts, and the page needs none."""
    visitor = await door.enter()
    visitor.expected += ["Content Security Policy"]
    await visitor.page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.wasRun = true";
        document.body.append(script);
    }""")
    assert await visitor.page.evaluate("window.wasRun") is None
    assert visitor.complaints, "the browser says that it refused"


def _marked(html: str) -> str:
    """With ``|`` around code instead of its elements."""
    start, end = '<pre tabindex="0" role="region" aria-label="Code"><code>', "</code></pre>"
    return html.replace(start, "|").replace(end, "|")
