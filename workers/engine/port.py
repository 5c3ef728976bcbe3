"""The engine protocol: what a worker asks of any engine.

An engine is driven by one thread (:mod:`workers.engine.loop`), does no I/O and knows nothing of
Redis. ``torch`` and ``simulated`` implement it; an engine of somebody else's would stand behind the
same calls.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from common.messages import Finish, PromptLogprobs, Sampling, TopTokens
from workers.engine.grammar import Matcher


class DeviceMemoryError(Exception):
    """A step did not fit the device's memory; what it would compute on is still usable."""


class DeviceLostError(Exception):
    """The device is unusable, and stays so in this process."""

    code = "CUDA_ERROR"
    """Of ``headrace explain``."""


class DeviceFaultError(DeviceLostError):
    """Its driver says that the device is at fault: another process would not fare better."""

    code = "GPU_HW_FAULT"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One generation for the engine: its prompt, its parameters and what its log already holds.

    ``logged`` are the tokens that earlier attempts produced; the engine prefills prompt and logged
    tokens alike and continues behind them, with detokenizer and stop state rebuilt by replay.
    Generations of one ``cache_scope`` may use each other's computed prefixes. ``matcher`` stands at
    the start of the answer; ``adapter`` is the version of one that is held already.
    """

    id: str
    prompt: list[int]
    sampling: Sampling
    logged: list[int] = field(default_factory=list[int])
    cache_scope: str = ""
    matcher: Matcher | None = None
    """Of ``sampling.grammar``; belongs to this request alone."""
    adapter: str = ""
    rank: int = 0
    """Whom it gives way to: those of a lower rank. 0 is interactive."""

    @property
    def cost(self) -> int:
        """Cache positions this generation may need: prompt plus allowed new tokens."""
        return len(self.prompt) + self.sampling.max_new_tokens


class StepOutput(msgspec.Struct, frozen=True, gc=False):
    """What one generation got out of one step; the fields are those of a token record.

    ``start`` counts generated tokens only (the prompt is not in the log). ``finish`` set: the
    engine has already freed everything that belongs to the generation. A failed one has no tokens.
    """

    id: str
    start: int
    tokens: list[int]
    pieces: list[bytes]
    logprobs: list[float]
    finish: Finish | None = None
    cached_tokens: int = 0
    """Tokens of the prompt that another generation had computed before."""
    tops: list[TopTokens] | None = None
    """One entry per token, where the request asks for any."""
    prompt: PromptLogprobs | None = None
    """With the first tokens, where the request asks for it."""


class Joined(msgspec.Struct, frozen=True, gc=False):
    """Where a generation stands in the batch that it came into."""

    id: str
    slot: int
    batch_size: int
    """Generations in that step."""
    cached_tokens: int
    pad_ratio: float = 0.0
    """Share of that step's token places that hold nobody's token."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Room and work at the end of a step."""

    running: int
    waiting: int
    free_tokens: int
    """Cost that may still be claimed."""
    free_slots: int
    spare_slots: int = 0
    """Beside these, for those that pause while others of a lower rank are served."""
    joined: tuple[Joined, ...] = ()
    """Who computed in the step for the first time."""


class StepWork(msgspec.Struct, frozen=True, gc=False):
    """What the last step was, for who measures; all zeros where nothing was computed.

    ``plan_s`` chose who computes what, ``forward_s`` computed and chose tokens, ``text_s`` made
    them into text and looked for ends; ``leave_s`` is the part of that which took out who ended.
    """

    num_rows: int = 0
    """Sequences that computed anything."""
    num_tokens: int = 0
    """Tokens in the forward pass: of prompts, of answers, and guessed ones."""
    num_prefill_tokens: int = 0
    """Of these, those of prompts or of what an earlier attempt had made."""
    num_padding: int = 0
    """Token places beside these that were computed for nobody."""
    num_joined: int = 0
    """Sequences that came into the running ones with it."""
    num_preempted: int = 0
    """Those that lost their place to it, for want of cache."""
    queried_tokens: int = 0
    """Tokens of prompts that joined: what a computed prefix was looked for."""
    found_tokens: int = 0
    """Of these, those that were there already."""
    used_tokens: int = 0
    """Places of the cache that belong to somebody behind it, whole blocks."""
    was_refused: bool = False
    """The device had no memory for it as it was planned."""
    plan_s: float = 0.0
    forward_s: float = 0.0
    text_s: float = 0.0
    leave_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Room for keys and values."""

    capacity_tokens: int
    """Most tokens of running sequences."""
    block_tokens: int
    """Grain in which prefixes are found, and in pages also given out."""
    token_bytes: int = 0
    """Of keys and values of one token, over all layers and devices; 0: there are none."""

    def bytes_of(self, num_tokens: int) -> int:
        """What so many tokens of one sequence take, in whole blocks."""
        block = self.block_tokens or 1
        return -(-num_tokens // block) * block * self.token_bytes


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What this process has of its device's memory, in bytes."""

    allocated_bytes: int = 0
    """In tensors."""
    reserved_bytes: int = 0
    """Taken from the device, for tensors of now and later."""
    peak_bytes: int = 0
    """Most that was ever in tensors."""


class Device(Protocol):
    """What an engine computes on, if that is more than a processor."""

    @property
    def uuids(self) -> tuple[str, ...]:
        """As the driver names them, such as ``GPU-0c5f…``; several where the model is spread."""
        ...

    @property
    def name(self) -> str: ...

    @property
    def total_bytes(self) -> int:
        """Memory of the first one."""
        ...

    def memory(self) -> DeviceMemory:
        """Of the first one. From any thread; no device or driver is asked, so it never waits."""
        ...


class Adapters(Protocol):
    """LoRA adapters of an engine, by version; it holds what it was given until it is dropped."""

    def read(self, version: str) -> Any:
        """What :meth:`put` takes, from the store; blocks, in any thread.

        Raises:
            Failure: ADAPTER_NOT_FOUND or ADAPTER_LOAD_FAILED.
        """
        ...

    def put(self, version: str, adapter: Any) -> None:
        """Hold it from the next step on; in the engine thread, and in no time to speak of."""
        ...

    def drop(self, version: str) -> None:
        """Hold it no longer; in the engine thread. No generation may have it any more."""
        ...


class Engine(Protocol):
    """Not thread-safe: every call comes from the engine thread."""

    model_version: str
    vocab_size: int
    """Token ids that it can choose from; may be more than the tokenizer has."""
    max_cost: int
    """Largest ``EngineRequest.cost`` that can ever run here."""

    @property
    def adapters(self) -> Adapters | None:
        """None: whatever adapter a generation names changes nothing (simulated engines)."""
        ...

    def submit(self, request: EngineRequest) -> None:
        """Queue a generation. A known id is replaced: the old attempt is forgotten first."""
        ...

    def cancel(self, id: str) -> None:
        """Forget a generation and free its cache before the next step; unknown ids are ignored."""
        ...

    def step(self) -> list[StepOutput]:
        """Run one forward pass for all that runs and return what came out; [] when idle.

        Raises nothing for one generation's fault: that one ends with ``Finish("failed", code)``.
        An exception means that the engine as a whole is unusable.
        """
        ...

    def load(self) -> EngineLoad: ...

    @property
    def last_step(self) -> StepWork:
        """Of the last call of :meth:`step`."""
        ...

    @property
    def cache_size(self) -> CacheSize: ...

    @property
    def device(self) -> Device | None:
        """None: a processor, or none at all."""
        ...
