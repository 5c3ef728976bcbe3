"""Continuous batching: requests share each forward pass and do not see one another."""

import asyncio

from ops.bench.sse_client import Reader
from tests.story.conftest import Stage

_TORCH = {"model": "tiny", "engine": "torch", "dtype": "float32", "max_step_tokens": 16}


async def test_two_share_a_batch_and_neither_changes_the_other(stage: Stage) -> None:
    """A real model in float32: greedy and sampled text is the same alone and together."""
    worker = await stage.worker(**_TORCH)
    _, client = await stage.gateway(**_TORCH)
    prompts = {
        "the first and the second": {"max_new_tokens": 60},
        "another one of them, rather longer than the step budget": {
            "max_new_tokens": 60,
            "do_sample": True,
            "temperature": 0.9,
            "seed": 5,
        },
    }
    alone = [await Reader().read_all(client, text, **more) for text, more in prompts.items()]
    together = await asyncio.gather(
        *(Reader().read_all(client, text, **more) for text, more in prompts.items())
    )
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    for reader in (*alone, *together):
        reader.check_whole()
    claims = worker.events("worker.claimed")
    assert len(claims) == 4
