"""A request that workers died of, set aside as Redis does it."""

import itertools
from dataclasses import dataclass, replace

from common.broker import Broker
from common.ids import new_request_id
from common.messages import GenerationSpec, Grammar, Sampling
from tests.support.generations import ScriptedClaims, admission

PROMPT = b"\x07\0\0\0" * 6
NUM_DEATHS = 4


@dataclass
class Killer:
    """A request that four workers died of, at last alone."""

    broker: Broker
    id: str
    workers: list[str]


async def killed(broker: Broker, *, num_choices: int = 1, choice: int = 0) -> Killer:
    request_id = new_request_id()
    spec = GenerationSpec(
        PROMPT,
        Sampling(9, seed=5, stop=("secret words",), grammar=Grammar("regex", "sesame")),
        request_id,
    )
    plain = admission(prompt_tokens=6, max_new_tokens=9, request_id=request_id)
    asked = replace(plain, spec=spec, num_choices=num_choices)
    await broker.beat_gateway("g1")
    await ScriptedClaims(broker, "w0").beat()
    await broker.admit(asked)
    id, workers = f"{request_id}.{choice}", list[str]()
    for number in itertools.count():
        worker = ScriptedClaims(broker, f"w{number}")
        await worker.beat()
        if id in {attempt.id for attempt in await worker.claim()}:
            workers.append(worker.name)
            await broker.bury_worker(worker.name)
            await broker.reap()
        if len(workers) == NUM_DEATHS:
            break
    return Killer(broker, id, workers)
