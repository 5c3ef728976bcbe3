"""From a loaded model to its paged way on CUDA: memory for pages, fused linears, and proof."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from common.failures import Failure
from workers.model.adapters import LinearShapes
from workers.model.fused_linears import fuse_linears
from workers.model.loader import (
    TOLERANCE,
    adaptable_linears,
    check_attention,
    difference,
    inspect_layers,
    position_limit,
    vocabulary_size,
)
from workers.model.paged_cache import PagedCache, page_bytes
from workers.model.paged_forward import PagedForward
from workers.model.plain_choice import select_choice
from workers.model.sampler import PlainChoice
from workers.model.sharding import least_of_all

PAGE_TOKENS = 16
"""Positions in a page, which is also the grain in which prefixes are shared."""


@dataclass(frozen=True, slots=True)
class PagedModel:
    """A model that computes over pages."""

    forward: PagedForward
    choose_plainly: PlainChoice | None
    """None: the sampler in torch chooses for all."""
    refused: dict[str, str]
    """What it could have, and why it has not."""
    num_pages: int
    token_bytes: int
    """Keys and values of one token."""
    linears: LinearShapes
    """Those that adapters may change."""
    vocab_size: int
    max_tokens: int
    """Longest sequence."""


def prepare_paged(
    model: PreTrainedModel,
    *,
    max_sequences: int,
    max_tokens: int,
    step_tokens: int,
    cache_tokens: int | None,
    memory_share: float,
    compiler: str | None = "inductor",
    records: bool = True,
) -> PagedModel:
    """Take over ``model``, which has been loaded with our attention to the device it stays on.

    Args:
        model: its linears are fused in place.
        max_sequences: most sequences in one step.
        max_tokens: longest sequence that is wanted; the model's own limit holds, too.
        step_tokens: most tokens in one step.
        cache_tokens: room for so many tokens, or what the memory holds if that is less; None is as
            many as the memory holds.
        memory_share: share of the memory that is free now that pages may take.
        compiler: see :class:`workers.model.paged_forward.PagedForward`.
        records: the same.

    Raises:
        Failure: MODEL_LOAD_FAILED, if it cannot run, would run wrongly, or has no room to.
    """
    layers = inspect_layers(model)
    expected = check_attention(model, layers)
    vocab_size = vocabulary_size(model)
    max_tokens = min(max_tokens, position_limit(model.config))
    dtype, device = model.dtype, expected.device
    linears = adaptable_linears(model)
    fuse_linears(model)
    num_bytes = page_bytes(layers, PAGE_TOKENS, dtype)
    num_pages = least_of_all(
        _num_pages(num_bytes, max_tokens, cache_tokens, memory_share, device), device
    )
    cache = PagedCache(
        layers, num_pages=num_pages, page_size=PAGE_TOKENS, dtype=dtype, device=device
    )
    forward = PagedForward(
        model,
        cache,
        max_sequences=max_sequences,
        max_tokens=max_tokens,
        step_tokens=step_tokens,
        compiler=compiler,
        records=records,
    )
    off_by = difference(lambda _: forward, expected, layers, dtype)
    if not off_by <= TOLERANCE[dtype]:
        raise Failure("MODEL_LOAD_FAILED", f"Over pages its logits would be off by {off_by:.1%}.")
    choose_plainly, reason = select_choice(vocab_size, dtype, device)
    return PagedModel(
        forward,
        choose_plainly,
        refused={} if reason is None else {"choice kernels": reason},
        num_pages=num_pages,
        token_bytes=num_bytes // PAGE_TOKENS,
        linears=linears,
        vocab_size=vocab_size,
        max_tokens=max_tokens,
    )


def _num_pages(
    num_bytes: int,
    max_tokens: int,
    cache_tokens: int | None,
    memory_share: float,
    device: torch.device,
) -> int:
    """As many pages of ``num_bytes`` as are wanted and fit; one sequence must, and the check."""
    longest = max(2, -(-max_tokens // PAGE_TOKENS))
    wanted = longest if cache_tokens is None else max(2, -(-cache_tokens // PAGE_TOKENS))
    if device.type != "cuda":
        return wanted
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    fitting = int(free_bytes * memory_share) // num_bytes
    if fitting < min(longest, wanted):
        message = f"{free_bytes >> 20} MiB are free, too few for {max_tokens} tokens of cache."
        raise Failure("MODEL_LOAD_FAILED", message)
    return fitting if cache_tokens is None else min(fitting, wanted)
