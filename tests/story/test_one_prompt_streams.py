"""One prompt, from the client's request to its last token."""

from ops.bench.sse_client import Reader
from tests.story.conftest import Stage


async def test_one_prompt_streams(stage: Stage) -> None:
    """Each token arrives as an event of its own; the last one brings the text and the timings."""
    await stage.worker()
    gateway, client = await stage.gateway()
    reader = await Reader().read_all(client, "Tell me about rivers.", max_new_tokens=20)

    reader.check_whole()
    assert reader.positions == list(range(1, len(reader.positions) + 1))
    assert reader.end["details"]["generated_tokens"] == len(reader.positions)
    timings = reader.end["headrace"]
    assert timings["model_version"].startswith("simulated@")
    assert timings["attempts"] == 1
    assert timings["tokens_per_second"] > 0
    assert reader.headers["x-model-version"] == timings["model_version"]

    line = await gateway.saw("request.finished")
    assert line["queue_time"] == timings["queue_time"]
    assert "rivers" not in str(gateway.events()), "a prompt is never logged"
