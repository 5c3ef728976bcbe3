"""Engines for tests: the tiny model behind the real engine, and what came out of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from common.clock import monotonic_s
from common.messages import Finish, Sampling, unescape_pieces
from common.models.tokenizer import Tokenizer
from tests.support.tiny_model import EOS_TOKEN_IDS
from workers.engine.batching import BatchingEngine, Launcher, Runner
from workers.engine.places import PagePlaces, Places
from workers.engine.port import Engine, EngineRequest, StepOutput
from workers.engine.scheduler import Limits
from workers.engine.sequence import TextRules
from workers.model.kv_cache import SlotCache
from workers.model.loader import load_model
from workers.model.paged_model import PAGE_TOKENS, PagedModel, prepare_paged
from workers.model.paged_runner import PagedRunner, count_places
from workers.model.runner import ModelRunner
from workers.model.ways import ReadyModel, prepare_model

CPU = torch.device("cpu")

ROOMY = Limits(max_sequences=8, cache_tokens=4096, step_tokens=256)
MAX_COST = 256


@dataclass
class Transcript:
    """All that one generation got out of an engine."""

    tokens: list[int] = field(default_factory=list[int])
    pieces: list[bytes] = field(default_factory=list[bytes])
    logprobs: list[float] = field(default_factory=list[float])
    finish: Finish | None = None

    @property
    def text(self) -> str:
        return unescape_pieces(self.pieces)


def ready_model(
    path: Path, way: str = "auto", dtype: torch.dtype = torch.float32, *, quantize: bool = False
) -> ReadyModel:
    """The model in ``path``, ready to compute in ``way`` on one thread."""
    return prepare_model(
        partial(load_model, path, dtype=dtype, device=CPU),
        wish=way,
        num_threads=1,
        quantize=quantize,
    )


def cache_for(ready: ReadyModel, num_slots: int, dtype: torch.dtype = torch.float32) -> SlotCache:
    return SlotCache(
        ready.layers, num_slots=num_slots, max_tokens=MAX_COST, dtype=dtype, device=CPU
    )


def tiny_runner(path: Path, limits: Limits = ROOMY) -> ModelRunner:
    """The model in ``path`` in float32, checked and with a cache for ``limits``."""
    ready = ready_model(path)
    assert ready.vocab_size == Tokenizer.load(path).vocab_size
    cache = cache_for(ready, limits.num_slots)
    return ModelRunner(ready.bind(cache), cache, ready.sampler)


def engine_around(
    runner: Runner,
    tokenizer: Tokenizer,
    limits: Limits = ROOMY,
    *,
    places: Places | None = None,
    launcher: Launcher | None = None,
    clock: Callable[[], float] = monotonic_s,
) -> BatchingEngine:
    return BatchingEngine(
        runner,
        TextRules(tokenizer, frozenset(EOS_TOKEN_IDS)),
        limits,
        model_version="tiny@1",
        max_cost=MAX_COST,
        vocab_size=tokenizer.vocab_size,
        places=places,
        launcher=launcher,
        clock=clock,
    )


def tiny_engine(path: Path, limits: Limits = ROOMY) -> BatchingEngine:
    return engine_around(tiny_runner(path, limits), Tokenizer.load(path), limits)


def tiny_paged(path: Path, limits: Limits = ROOMY, compiler: Any = None) -> PagedModel:
    """The way for CUDA, computing the same on the processor; ``compiler`` as torch has them."""
    return prepare_paged(
        load_model(path, dtype=torch.float32, device=CPU),
        max_sequences=limits.max_sequences,
        max_tokens=MAX_COST,
        step_tokens=limits.step_tokens,
        cache_tokens=limits.cache_tokens,
        memory_share=0.5,
        compiler=compiler,
    )


def tiny_paged_engine(path: Path, limits: Limits = ROOMY, compiler: Any = None) -> BatchingEngine:
    ready = tiny_paged(path, limits, compiler)
    tokenizer = Tokenizer.load(path)
    return BatchingEngine(
        PagedRunner(ready.forward),
        TextRules(tokenizer, frozenset(EOS_TOKEN_IDS)),
        limits,
        model_version="tiny@1",
        max_cost=MAX_COST,
        vocab_size=ready.vocab_size,
        places=PagePlaces(
            ready.num_pages, page_tokens=PAGE_TOKENS, max_sequences=limits.max_sequences
        ),
        num_places=partial(count_places, ready.forward),
        token_bytes=ready.token_bytes,
    )


def is_busy(engine: Engine) -> bool:
    load = engine.load()
    return load.running + load.waiting > 0


def collect(transcripts: dict[str, Transcript], outputs: list[StepOutput]) -> None:
    """Append one step's outputs, checking that each generation is dense and ends once."""
    for output in outputs:
        transcript = transcripts.setdefault(output.id, Transcript())
        assert transcript.finish is None, f"{output.id} goes on after its end"
        assert len(output.tokens) == len(output.pieces) == len(output.logprobs)
        transcript.tokens += output.tokens
        transcript.pieces += output.pieces
        transcript.logprobs += output.logprobs
        transcript.finish = output.finish


def run_all(engine: Engine, requests: list[EngineRequest]) -> dict[str, Transcript]:
    """Submit all, step until idle; every request must have ended."""
    transcripts: dict[str, Transcript] = {}
    for request in requests:
        engine.submit(request)
    collect(transcripts, engine.step())
    while is_busy(engine):
        collect(transcripts, engine.step())
    assert {request.id for request in requests} <= transcripts.keys()
    assert all(transcript.finish is not None for transcript in transcripts.values())
    return transcripts


def run_one(engine: Engine, request: EngineRequest) -> Transcript:
    return run_all(engine, [request])[request.id]


def request(
    id: str, prompt: list[int], *, logged: list[int] | None = None, **sampling: Any
) -> EngineRequest:
    """A request; what ``sampling`` does not name is greedy, 16 tokens, seed 0."""
    values: dict[str, Any] = {"max_new_tokens": 16, "seed": 0} | sampling
    return EngineRequest(id, prompt, Sampling(**values), logged or [])


@lru_cache
def byte_fallback_tokenizer() -> Tokenizer:
    """As of the Llama 2 family: words with a leading ``▁``, and 256 tokens of one byte each."""
    pieces = ["▁", "a", "▁a", "é", "▁the", "\ufffd", "ok", "👍"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    backend = Backend(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})
