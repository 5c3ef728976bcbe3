"""A worker is killed in the middle of a sentence; another one finishes it."""

from ops.bench.sse_client import Reader, take
from tests.story.conftest import Stage


async def test_a_worker_is_killed_and_the_client_sees_no_gap_and_no_repeat(stage: Stage) -> None:
    """SIGKILL mid-stream: the same connection goes on, with the tokens the first had made."""
    await stage.two_workers()
    _, client = await stage.gateway()
    undisturbed = await Reader().read_all(client, "hello", max_new_tokens=60, seed=3)

    reader = Reader()
    async with reader.generate(client, "hello", max_new_tokens=60, seed=3) as events:
        await take(events, 10)
        victim, _ = await stage.holder_and_heir(reader.stream_id)
        victim.kill()
        async for _ in events:
            pass
    reader.check_whole()
    assert reader.token_ids == undisturbed.token_ids
    assert reader.end["headrace"]["attempts"] == 2


async def test_a_zombie_is_fenced(stage: Stage) -> None:
    """A worker sleeps longer than its lease and wakes up: what it still says is refused."""
    await stage.two_workers()
    _, client = await stage.gateway()
    reader = Reader()
    async with reader.generate(client, "hello", max_new_tokens=100, seed=3) as events:
        await take(events, 10)
        zombie, heir = await stage.holder_and_heir(reader.stream_id)
        zombie.pause()
        await heir.saw("worker.claimed", job_id=f"{reader.stream_id}.0")
        zombie.resume()
        async for _ in events:
            pass
    reader.check_whole()
    assert reader.end["headrace"]["attempts"] == 2
    await zombie.saw("generation.lost", job_id=f"{reader.stream_id}.0")
    assert zombie.exit_code is None, "it works on as a normal worker"
    again = await Reader().read_all(client, "still there?", max_new_tokens=5)
    again.check_whole()
