"""``headrace.js`` and ``text.js`` by themselves: what a page of somebody else's may rely on."""

from typing import Any

import pytest

from tests.browser.conftest import Door, Site, Visitor

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
