"""What every rank does alike, in the same order: meet, load its part, prove it, and make a forward.

All of it takes part in collectives, so a rank that left out one load or one check would leave the
others waiting.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from common.failures import Failure
from common.models.adapters import AdapterStore
from workers.model.adapters import StoredAdapters
from workers.model.kv_cache import SlotCache
from workers.model.loader import select_device, select_dtype
from workers.model.paged_cache import page_bytes
from workers.model.paged_model import prepare_paged
from workers.model.paged_runner import PadsSteps
from workers.model.runner import Forward
from workers.model.sampler import Sampler, sample
from workers.model.sharding import AdapterParts, LinearParts, join_ranks, load_part
from workers.model.ways import available_threads, prepare_model
from workers.tensor_parallel.messages import RankPlan

PAGED = "paged"
"""The way of CUDA; the others are those of :data:`workers.model.ways.WAYS`."""


def select_devices(device: str, dtype: str, num_ranks: int) -> tuple[str, str]:
    """Type of the devices and name of torch's type for numbers, from the settings of those names.

    Raises:
        Failure: MODEL_LOAD_FAILED, if there are not so many devices, or not such numbers.
    """
    selected = select_device(device)
    has_cuda = torch.cuda.is_available()
    if selected.type == "cuda":
        if ":" in device:
            message = f"With tensor_parallel={num_ranks} the device is cuda, and not {device}."
            raise Failure("MODEL_LOAD_FAILED", message)
        if torch.cuda.device_count() < num_ranks:
            found = torch.cuda.device_count()
            message = f"tensor_parallel is {num_ranks}, and the CUDA devices here are {found}."
            raise Failure("MODEL_LOAD_FAILED", message)
    elif has_cuda:  # which transformers would take all the same
        message = "To spread a model over processors, hide the GPUs: CUDA_VISIBLE_DEVICES=''."
        raise Failure("MODEL_LOAD_FAILED", message)
    return selected.type, str(select_dtype(dtype, selected)).removeprefix("torch.")


def select_way(wish: str, device: str) -> str:
    """How each rank computes: over pages on CUDA, with packed weights on processors.

    Raises:
        Failure: MODEL_LOAD_FAILED, for a way that computes on one processor only.
    """
    if wish in ("step", "operations"):
        message = f"engine_way={wish} computes on one processor; take modules or plain."
        raise Failure("MODEL_LOAD_FAILED", message)
    if wish != "auto":
        return wish
    if device == "cuda":
        return PAGED
    return "modules" if torch.backends.mkldnn.is_available() else "plain"


def share_of_threads(num_ranks: int) -> int:
    """On one machine, all ranks share its cores."""
    return max(1, available_threads() // num_ranks)


@dataclass(frozen=True, slots=True)
class ReadyRank:
    """One rank's part of a model, ready for steps that all ranks compute together."""

    way: str
    forward: Forward
    cache: SlotCache | None
    """None: pages, which need nothing between steps."""
    num_pages: int
    token_bytes: int
    """Keys and values of one token, in this rank's memory."""
    padded: PadsSteps | None
    """None: its steps have no padding."""
    device: torch.device
    sampler: Sampler
    """On rank 0 alone is it ever asked."""
    adapters: StoredAdapters
    vocab_size: int
    max_tokens: int
    """Longest sequence."""


def prepare_rank(plan: RankPlan, rank: int) -> ReadyRank:
    """Blocks until all ranks have come as far.

    Raises:
        Failure: MODEL_LOAD_FAILED.
    """
    device = torch.device(plan.device, rank) if plan.device == "cuda" else torch.device("cpu")
    dtype: torch.dtype = getattr(torch, plan.dtype)
    join_ranks(Path(plan.store), rank, plan.num_ranks, device)
    loading = _Loading(plan, dtype, device)
    if plan.way == PAGED:
        return _prepare_pages(plan, loading)
    ready = prepare_model(loading.load, wish=plan.way, num_threads=plan.num_threads)
    max_tokens = min(plan.max_tokens, ready.max_tokens)
    cache = SlotCache(
        ready.layers,
        num_slots=plan.max_sequences,
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
    )
    forward = ready.bind(cache)
    return ReadyRank(
        ready.way,
        forward,
        cache,
        0,
        page_bytes(ready.layers, 1, dtype),
        None,
        device,
        ready.sampler,
        loading.adapters(forward),
        ready.vocab_size,
        max_tokens,
    )


def _prepare_pages(plan: RankPlan, loading: "_Loading") -> ReadyRank:
    """Neither compiled nor recorded: what compilers and graphs make of collectives is unproven."""
    try:
        ready = prepare_paged(
            loading.load(),
            max_sequences=plan.max_sequences,
            max_tokens=plan.max_tokens,
            step_tokens=plan.step_tokens,
            cache_tokens=plan.cache_tokens,
            memory_share=plan.memory_share,
            compiler=None,
            records=False,
        )
    except Failure:
        raise
    except Exception as error:
        # No rank may fall back by itself: the others would wait for it.
        message = f"{type(error).__name__}: {error}. It may do without pages: engine_way=plain."
        raise Failure("MODEL_LOAD_FAILED", message) from error
    adapters = loading.adapters(ready.forward)
    return ReadyRank(
        PAGED,
        ready.forward,
        None,
        ready.num_pages,
        ready.token_bytes,
        ready.forward,
        loading.device,
        sample,
        adapters,
        ready.vocab_size,
        ready.max_tokens,
    )


class _Loading:
    """Loads the part as often as is asked, and remembers how it was cut."""

    def __init__(self, plan: RankPlan, dtype: torch.dtype, device: torch.device) -> None:
        self._plan = plan
        self._dtype = dtype
        self.device = device
        self._parts = LinearParts({}, {})

    def load(self) -> PreTrainedModel:
        path = Path(self._plan.path)
        model, self._parts = load_part(path, dtype=self._dtype, device=self.device)
        return model

    def adapters(self, forward: Forward) -> StoredAdapters:
        return StoredAdapters(
            AdapterStore.beside(Path(self._plan.data_dir), self._plan.model),
            AdapterParts(forward.adapters, self._parts.cuts),
            self._parts.linears,
            dtype=self._dtype,
            device=self.device,
        )
