"""Builds the engine that the settings ask for; the one place that knows all engines.

torch is imported only for the engine that needs it, so that a simulated worker starts at once.
"""

import gc
import hashlib
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from common.clock import monotonic_s
from common.failures import Failure
from common.logs import get_logger
from common.models.adapters import AdapterStore
from common.models.files import read_json
from common.models.store import SIMULATED_MODEL, ModelStore, StoredModel
from common.models.tokenizer import Tokenizer
from common.settings import WorkerSettings
from workers.engine.batching import BatchingEngine, count_tokens
from workers.engine.lookup import MAX_DRAFT_TOKENS
from workers.engine.places import PagePlaces
from workers.engine.port import Engine
from workers.engine.scheduler import Limits
from workers.engine.sequence import TextRules
from workers.engine.simulated import SCRIPT, SimulatedRunner

if TYPE_CHECKING:
    from workers.tensor_parallel.followers import Followers
    from workers.tensor_parallel.messages import RankPlan

log = get_logger()


def build_engine(
    settings: WorkerSettings, on_lost: Callable[[Exception], None] = lambda _: None
) -> Engine:
    """Load the model from the store and put an engine around it; blocks for seconds.

    ``on_lost`` is called, from any thread, should the engine become unable to compute, be it while
    it is built, in the middle of a step that will never end, or when idle.

    Raises:
        Failure: MODEL_NOT_FOUND, MODEL_LOAD_FAILED or WEIGHTS_MISMATCH.
    """
    store = ModelStore(settings.data_dir)
    if settings.model == SIMULATED_MODEL:
        store.add_simulated()
    stored = store.get(settings.model)
    if settings.engine == "simulated":
        return build_simulated(settings, stored)
    if settings.tensor_parallel > 1:
        return build_group(settings, stored, on_lost)
    return build_torch(settings, stored)


def build_simulated(settings: WorkerSettings, stored: StoredModel) -> BatchingEngine:
    """Scripted text in the tokens of ``stored``, whose weights, if any, are left alone."""
    tokenizer = Tokenizer.load(stored.path)
    eos_token_ids = stored.manifest.eos_token_ids
    if not eos_token_ids:
        raise Failure("MODEL_LOAD_FAILED", f"{settings.model} names no end-of-sequence token.")
    began_s = _tell_loading(stored)
    runner = SimulatedRunner(
        tokenizer,
        eos_token_ids[0],
        first_token_s=settings.simulated_first_token_ms / 1000,
        inter_token_s=settings.simulated_inter_token_ms / 1000,
    )
    _tell_loaded(stored, began_s)
    log.info("engine.selected", engine="simulated", model=settings.model, device="cpu")
    return BatchingEngine(
        runner,
        _text_rules(tokenizer, stored),
        _limits(settings),
        model_version=_simulated_version(stored),
        max_cost=min(settings.max_total_tokens, stored.manifest.max_position_embeddings),
        vocab_size=tokenizer.vocab_size,
    )


def build_torch(settings: WorkerSettings, stored: StoredModel) -> BatchingEngine:
    """A model of transformers on our attention and cache, verified before and after loading."""
    _limit_busy_waiting()
    from workers.model.loader import load_model, select_device, select_dtype

    stored.verify()
    log.info("model.verified", model_version=stored.manifest.version)
    device = select_device(settings.device)
    dtype = select_dtype(settings.dtype, device)
    if settings.quantize != "none" and device.type != "cpu":
        message = f"quantize={settings.quantize} is for processors; the device is {device.type}."
        raise Failure("MODEL_LOAD_FAILED", message)
    began_s = _tell_loading(stored)
    refused: dict[str, str] = {}
    if device.type == "cuda" and settings.engine_way == "auto":
        try:
            return build_paged(
                settings,
                stored,
                load_model(stored.path, dtype=dtype, device=device),
                began_s=began_s,
            )
        except Exception as error:  # noqa: BLE001 - slower on slots is better than not at all
            refused["cuda"] = f"{type(error).__name__}: {error}"
        gc.collect()  # modules refer to one another, and would stay beside the next ones
    return _build_slots(
        settings, stored, dtype=dtype, device=device, refused=refused, began_s=began_s
    )


def _tell_loading(stored: StoredModel) -> float:
    """Returns when it began."""
    manifest = stored.manifest
    log.info("model.loading", model_version=manifest.version, revision=manifest.revision)
    return monotonic_s()


def _tell_loaded(stored: StoredModel, began_s: float) -> None:
    manifest = stored.manifest
    log.info(
        "model.loaded",
        model_version=manifest.version,
        load_s=round(monotonic_s() - began_s, 3),
        revision=manifest.revision,
        sha256=manifest.weights_sha256,
    )


def build_paged(
    settings: WorkerSettings, stored: StoredModel, model: Any, *, began_s: float | None = None
) -> BatchingEngine:
    """The loaded ``model`` over pages, with as large a cache as fits its device; loading it began
    at ``began_s``.
    """
    from workers.model.adapters import StoredAdapters
    from workers.model.device import device_of
    from workers.model.paged_model import PAGE_TOKENS, prepare_paged
    from workers.model.paged_runner import PagedRunner, count_places

    limits = _limits(settings)
    is_bounded = "max_batch_total_tokens" in settings.model_fields_set
    ready = prepare_paged(
        model,
        max_sequences=limits.max_sequences,
        max_tokens=settings.max_total_tokens,
        step_tokens=limits.step_tokens,
        cache_tokens=limits.cache_tokens if is_bounded else None,
        memory_share=settings.cuda_memory_share,
    )
    _tell_loaded(stored, monotonic_s() if began_s is None else began_s)
    log.info(
        "engine.selected",
        engine="torch",
        way=ready.forward.name,
        refused=ready.refused,
        uncompiled_reason=ready.forward.uncompiled_reason,
        is_recorded=ready.forward.is_recorded,
        cache_tokens=ready.num_pages * PAGE_TOKENS,
        device=str(model.device),
        dtype=str(model.dtype),
    )
    runner = PagedRunner(ready.forward, ready.choose_plainly)
    return BatchingEngine(
        runner,
        _text_rules(Tokenizer.load(stored.path), stored),
        limits,
        model_version=stored.manifest.version,
        max_cost=ready.max_tokens,
        vocab_size=ready.vocab_size,
        places=PagePlaces(ready.num_pages, page_tokens=PAGE_TOKENS, max_sequences=limits.num_slots),
        adapters=StoredAdapters(
            _adapters_of(settings, stored),
            ready.forward.adapters,
            ready.linears,
            dtype=model.dtype,
            device=model.device,
        ),
        launcher=runner if model.device.type == "cuda" else None,
        num_places=partial(count_places, ready.forward),
        token_bytes=ready.token_bytes,
        device=device_of(model.device),
    )


def _build_slots(
    settings: WorkerSettings,
    stored: StoredModel,
    *,
    dtype: Any,
    device: Any,
    refused: dict[str, str],
    began_s: float,
) -> BatchingEngine:
    """The model on contiguous slots, in the best way that takes it; ``refused`` are better ones."""
    from workers.model.adapters import StoredAdapters
    from workers.model.device import device_of
    from workers.model.kv_cache import SlotCache
    from workers.model.loader import load_model
    from workers.model.paged_cache import page_bytes
    from workers.model.runner import ModelRunner
    from workers.model.ways import prepare_model

    ready = prepare_model(
        partial(load_model, stored.path, dtype=dtype, device=device),
        wish=settings.engine_way,
        num_threads=settings.num_threads,
        quantize=settings.quantize == "int8",
    )
    max_cost = min(settings.max_total_tokens, ready.max_tokens)
    cache = SlotCache(
        ready.layers,
        num_slots=_limits(settings).num_slots,
        max_tokens=max_cost,
        dtype=dtype,
        device=device,
    )
    _tell_loaded(stored, began_s)
    log.info(
        "engine.selected",
        engine="torch",
        way=ready.way,
        refused=refused | ready.refused,
        device=str(device),
        dtype=str(dtype),
        quantize=settings.quantize,
        num_threads=ready.num_threads,
    )
    forward = ready.bind(cache)
    return BatchingEngine(
        ModelRunner(forward, cache, ready.sampler),
        _text_rules(Tokenizer.load(stored.path), stored),
        _limits(settings),
        model_version=_model_version(stored, settings),
        max_cost=max_cost,
        vocab_size=ready.vocab_size,
        adapters=StoredAdapters(
            _adapters_of(settings, stored),
            forward.adapters,
            ready.linears,
            dtype=dtype,
            device=device,
        ),
        token_bytes=page_bytes(ready.layers, 1, dtype),
        device=device_of(device),
    )


def build_group(
    settings: WorkerSettings, stored: StoredModel, on_lost: Callable[[Exception], None]
) -> BatchingEngine:
    """A model spread over as many devices as ``settings`` say, each with a process of its own.

    All of them compute each step; this one plans it and chooses the tokens.
    """
    _limit_busy_waiting()
    from workers.tensor_parallel.followers import Followers

    stored.verify()
    log.info("model.verified", model_version=stored.manifest.version)
    # Before torch is imported here: they need as long for that.
    followers = Followers(settings.tensor_parallel, on_lost)
    try:
        return _build_leader(settings, stored, followers)
    except BaseException:
        followers.close()
        raise


def _build_leader(
    settings: WorkerSettings, stored: StoredModel, followers: "Followers"
) -> BatchingEngine:
    from workers.model.device import device_of
    from workers.model.paged_model import PAGE_TOKENS
    from workers.model.paged_runner import count_places
    from workers.model.runner import ModelRunner
    from workers.model.sharding import check_shardable
    from workers.tensor_parallel.leading import LeadingAdapters, LeadingForward
    from workers.tensor_parallel.rank import prepare_rank

    plan = _rank_plan(settings, stored, followers)
    check_shardable(stored.path, plan.num_ranks)
    began_s = _tell_loading(stored)
    followers.join(plan)
    rank = prepare_rank(plan, 0)
    followers.answers()
    _tell_loaded(stored, began_s)
    log.info(
        "engine.selected",
        engine="torch",
        way=rank.way,
        device=plan.device,
        dtype=plan.dtype,
        num_ranks=plan.num_ranks,
        num_threads=plan.num_threads,
    )
    forward = LeadingForward(rank.forward, rank.cache, followers)
    limits = _limits(settings)
    places, num_places = None, count_tokens
    if rank.padded is not None:
        num_places = partial(count_places, rank.padded)
    if rank.cache is None:
        places = PagePlaces(rank.num_pages, page_tokens=PAGE_TOKENS, max_sequences=limits.num_slots)
    return BatchingEngine(
        ModelRunner(forward, None if rank.cache is None else forward, rank.sampler),
        _text_rules(Tokenizer.load(stored.path), stored),
        limits,
        model_version=_model_version(stored, settings),
        max_cost=rank.max_tokens,
        vocab_size=rank.vocab_size,
        places=places,
        adapters=LeadingAdapters(rank.adapters, followers),
        num_places=num_places,
        token_bytes=rank.token_bytes * plan.num_ranks,
        device=device_of(rank.device, plan.num_ranks),
    )


def _rank_plan(settings: WorkerSettings, stored: StoredModel, followers: "Followers") -> "RankPlan":
    """What each rank is to load and how. Raises: Failure, for what a group cannot do."""
    from workers.tensor_parallel.messages import RankPlan
    from workers.tensor_parallel.rank import select_devices, select_way, share_of_threads

    num_ranks = settings.tensor_parallel
    if settings.quantize != "none":
        message = f"quantize={settings.quantize} is for models that are not spread over devices."
        raise Failure("MODEL_LOAD_FAILED", message)
    device, dtype = select_devices(settings.device, settings.dtype, num_ranks)
    limits = _limits(settings)
    is_bounded = "max_batch_total_tokens" in settings.model_fields_set
    return RankPlan(
        path=str(stored.path),
        data_dir=str(settings.data_dir),
        model=stored.manifest.name,
        log_dir=None if settings.log_dir is None else str(settings.log_dir),
        store=str(followers.store),
        num_ranks=num_ranks,
        device=device,
        dtype=dtype,
        way=select_way(settings.engine_way, device),
        num_threads=settings.num_threads or share_of_threads(num_ranks),
        max_sequences=limits.num_slots,
        max_tokens=settings.max_total_tokens,
        step_tokens=limits.step_tokens,
        cache_tokens=limits.cache_tokens if is_bounded else None,
        memory_share=settings.cuda_memory_share,
    )


def _limit_busy_waiting() -> None:
    """Let torch's second thread sleep soon after each operation; must come before torch's import.

    By default it spins for milliseconds, which is fine on an idle machine. Beside a gateway, Redis
    or a second worker on the same cores, steps were measured to take 5 to 20 times as long.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _text_rules(tokenizer: Tokenizer, stored: StoredModel) -> TextRules:
    return TextRules(tokenizer, frozenset(stored.manifest.eos_token_ids))


def _adapters_of(settings: WorkerSettings, stored: StoredModel) -> AdapterStore:
    return AdapterStore.beside(settings.data_dir, stored.manifest.name)


def _limits(settings: WorkerSettings) -> Limits:
    speculates = settings.speculation == "auto" and settings.engine == "torch"
    return Limits(
        max_sequences=settings.max_batch_size,
        cache_tokens=settings.max_batch_total_tokens,
        step_tokens=settings.max_step_tokens,
        draft_tokens=MAX_DRAFT_TOKENS if speculates else 0,
        spare_sequences=-(-settings.max_batch_size // 4),
    )


def _model_version(stored: StoredModel, settings: WorkerSettings) -> str:
    """Other weights, and other orders of summation, give other answers: what such workers began,
    only such can go on with.
    """
    quantize, num_ranks = settings.quantize, settings.tensor_parallel
    quantized = "" if quantize == "none" else f"+{quantize}"
    return stored.manifest.version + quantized + (f"+tp{num_ranks}" if num_ranks > 1 else "")


def _simulated_version(stored: StoredModel) -> str:
    """That of the model without weights, of which the script is a part; for another one's tokens
    one of its own. Equal wherever script and tokenizer are, because then the tokens are.
    """
    if read_json(stored.path / "config.json").get("script") == list(SCRIPT):
        return stored.manifest.version
    content = "\n".join((stored.manifest.tokenizer_sha256, *SCRIPT))
    return f"simulated@{hashlib.sha256(content.encode()).hexdigest()[:12]}"
