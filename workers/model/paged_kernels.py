"""Triton kernels of attention over pages: one that attends, one that stores, one that combines.

What decode costs is reading keys and values once, so the query heads that share a key head are the
rows of one small matrix product. A decode row's own key and value come from the model, not from the
cache: the program that begins with them stores them on the way. Where there are too few sequences
to keep the chip busy, the positions of each are split over several programs whose sums are combined
after (flash decoding). Loads are masked to positions that have been written; the softmax is the
online one of FlashAttention (Dao et al. 2022, algorithm 1), in float32.
"""

# Triton gives the language of its kernels no types, and exists on CUDA machines only.
# pyright: reportMissingImports=none, reportUntypedFunctionDecorator=none
# pyright: reportIndexIssue=none
# pyright: reportMissingParameterType=none, reportUnknownParameterType=none
# ruff: noqa: N803, PLR0915 - constants in capitals, and one kernel is one function
# pyright: reportConstantRedefinition=none, reportOperatorIssue=none

import torch
import triton
import triton.language as tl

from workers.model.paged_attention import TILE_TOKENS, Masking

_BUSY_PROGRAMS = 128
"""Programs that keep a large chip busy (an H100 has 132 multiprocessors); no splitting beyond."""

_MAX_SPLITS = 16


class TritonKernels:
    """Implements :class:`workers.model.paged_attention.Kernels`."""

    def attend_rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        lengths: torch.Tensor,
        table: torch.Tensor,
        output: torch.Tensor,
        masking: Masking,
    ) -> None:
        num_rows, num_heads, _ = query.shape
        num_key_heads, value_size = value.shape[1:]
        group = num_heads // num_key_heads
        splits = _num_splits(num_rows * num_key_heads)
        sums = maxima = output
        if splits > 1:
            parts = (num_rows, num_heads, splits)
            sums = output.new_empty((*parts, value_size + 1), dtype=torch.float32)
            maxima = output.new_empty(parts, dtype=torch.float32)
        _attend[num_rows, num_key_heads, splits](
            *_in_rows(query, key, value),
            *cache,
            table,
            lengths,
            output,
            sums,
            maxima,
            *_strides(query, key, value, table),
            **_constants(query, value, cache, masking),
            GROUP=group,
            PART=group,
            ROWS=max(16, triton.next_power_of_2(group)),
            TOKENS=1,
            IS_DECODE=True,
            SPLITS=splits,
            num_warps=4,
        )
        if splits > 1:
            _combine[num_rows, num_heads](
                sums,
                maxima,
                output,
                VALUE_SIZE=value_size,
                VALUE_LANES=_lanes(value_size),
                SPLITS=splits,
                num_warps=2,
            )

    def attend_tiles(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        tiles: torch.Tensor,
        table: torch.Tensor,
        output: torch.Tensor,
        masking: Masking,
    ) -> None:
        query, key, value = _in_rows(query, key, value)
        num_key_heads = key.shape[1]
        group = query.shape[1] // num_key_heads
        rows, part, tokens, warps = _prefill_shape(query, group)
        constants = _constants(query, value, cache, masking)
        strides = _strides(query, key, value, table)
        # All tiles first: a later tile of the same sequence reads what an earlier one stores.
        _store[len(tiles), num_key_heads](
            key,
            value,
            *cache,
            table,
            tiles,
            *strides[2:],
            TOKENS=TILE_TOKENS,
            **{name: constants[name] for name in _STORE_CONSTANTS},
        )
        _attend[len(tiles), num_key_heads * triton.cdiv(group, part), 1](
            query,
            key,
            value,
            *cache,
            table,
            tiles,
            output,
            output,
            output,
            *strides,
            **constants,
            GROUP=group,
            PART=part,
            ROWS=rows,
            TOKENS=tokens,
            IS_DECODE=False,
            SPLITS=1,
            num_warps=warps,
        )


_STORE_CONSTANTS = ("KEY_SIZE", "KEY_LANES", "VALUE_SIZE", "VALUE_LANES", "PAGE_SIZE")


def _num_splits(num_programs: int) -> int:
    splits = 1
    while splits < _MAX_SPLITS and num_programs * splits * 2 <= _BUSY_PROGRAMS:
        splits *= 2
    return splits


def _prefill_shape(query: torch.Tensor, group: int) -> tuple[int, int, int, int]:
    """Rows, query heads, tokens and warps of a program that attends to a tile.

    Sized so that a program fits 99 KiB of shared memory, which all chips since 2020 have.
    """
    row_bytes = _lanes(query.shape[2]) * query.element_size()
    most_rows = 128 if row_bytes <= 128 else 64 if row_bytes <= 256 else 32
    part = min(triton.next_power_of_2(group), most_rows // TILE_TOKENS)
    rows = TILE_TOKENS * part
    return rows, part, TILE_TOKENS, 8 if rows >= 128 else 4


def _lanes(size: int) -> int:
    """Matrix products want powers of two, 16 at least; what is too much is masked."""
    return max(16, triton.next_power_of_2(size))


def _in_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each head's numbers side by side; models hand over views of all kinds."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _strides(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor
) -> list[int]:
    each = [stride for tensor in (query, key, value) for stride in tensor.stride()[:2]]
    return [*each, table.stride(0)]


def _constants(
    query: torch.Tensor,
    value: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    masking: Masking,
) -> dict[str, int | float | bool]:
    size, value_size = query.shape[2], value.shape[2]
    row_bytes = _lanes(max(size, value_size)) * query.element_size()
    return {
        "SCALE": size**-0.5 if masking.scale is None else masking.scale,
        "WINDOW": masking.window or 0,
        "SOFTCAP": masking.softcap or 0.0,
        "KEY_SIZE": size,
        "KEY_LANES": _lanes(size),
        "VALUE_SIZE": value_size,
        "VALUE_LANES": _lanes(value_size),
        "PAGE_SIZE": cache[0].shape[1],
        "POSITIONS": 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16,
    }


@triton.jit
def _attend(
    query,
    key,
    value,
    key_cache,
    value_cache,
    table,
    tiles,  # decode: the length of each row; else (sequence, first token, its position, tokens)
    output,
    sums,
    maxima,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    table_row,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,  # 0: none
    KEY_SIZE: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,  # cached positions per round
    GROUP: tl.constexpr,  # query heads to a key head
    PART: tl.constexpr,  # of these, in this program
    ROWS: tl.constexpr,  # TOKENS * PART, padded
    TOKENS: tl.constexpr,
    IS_DECODE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    tile = tl.program_id(0)
    parts: tl.constexpr = (GROUP + PART - 1) // PART
    head = tl.program_id(1) // parts
    part = tl.program_id(1) % parts
    split = tl.program_id(2)
    num_key_heads = tl.num_programs(1) // parts
    if IS_DECODE:
        sequence = tile
        first = tile
        start = tl.load(tiles + tile) - 1
        count = 1
        end = tl.maximum(start, 0)
    else:
        sequence = tl.load(tiles + tile * 4)
        first = tl.load(tiles + tile * 4 + 1)
        start = tl.load(tiles + tile * 4 + 2)
        count = tl.load(tiles + tile * 4 + 3)
        end = start + count

    row = tl.arange(0, ROWS)
    in_group = part * PART + row % PART
    token = row // PART
    position = start + token
    is_row = (token < count) & (token < TOKENS) & (in_group < GROUP)
    query_row = (first + token).to(tl.int64)
    query_number = head * GROUP + in_group
    key_lane = tl.arange(0, KEY_LANES)
    value_lane = tl.arange(0, VALUE_LANES)
    is_key = key_lane < KEY_SIZE
    is_value = value_lane < VALUE_SIZE
    queries = tl.load(
        query + (query_row * query_token + query_number * query_head)[:, None] + key_lane[None, :],
        mask=is_row[:, None] & is_key[None, :],
        other=0.0,
    )

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_ = tl.zeros([ROWS, VALUE_LANES], tl.float32)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(start - WINDOW + 1, 0)
    if IS_DECODE:
        share = tl.cdiv(tl.cdiv(end - begin, POSITIONS), SPLITS) * POSITIONS
        begin += split * share
        end = tl.minimum(end, begin + share)
        if split == 0:
            own_key = tl.load(
                key + first.to(tl.int64) * key_token + head * key_head + key_lane,
                mask=is_key,
                other=0.0,
            )
            own_value = tl.load(
                value + first.to(tl.int64) * value_token + head * value_head + value_lane,
                mask=is_value,
                other=0.0,
            )
            if start >= 0:
                page = tl.load(table + sequence * table_row + start // PAGE_SIZE).to(tl.int64)
                place = (page * PAGE_SIZE + start % PAGE_SIZE) * num_key_heads + head
                tl.store(key_cache + place * KEY_SIZE + key_lane, own_key, mask=is_key)
                tl.store(value_cache + place * VALUE_SIZE + value_lane, own_value, mask=is_value)
            products = queries.to(tl.float32) * own_key.to(tl.float32)[None, :]
            highest = tl.sum(products, 1) * SCALE
            if SOFTCAP > 0:
                highest = SOFTCAP * (2 * tl.sigmoid(2 * highest / SOFTCAP) - 1)
            total += 1.0
            sum_ += own_value.to(tl.float32)[None, :]

    for round_ in range(begin, end, POSITIONS):
        cached = round_ + tl.arange(0, POSITIONS)
        is_cached = cached < end
        page = tl.load(
            table + sequence * table_row + cached // PAGE_SIZE, mask=is_cached, other=0
        ).to(tl.int64)
        place = (page * PAGE_SIZE + cached % PAGE_SIZE) * num_key_heads + head
        keys = tl.load(
            key_cache + (place * KEY_SIZE)[None, :] + key_lane[:, None],
            mask=is_cached[None, :] & is_key[:, None],
            other=0.0,
        )
        values = tl.load(
            value_cache + (place * VALUE_SIZE)[:, None] + value_lane[None, :],
            mask=is_cached[:, None] & is_value[None, :],
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision="ieee") * SCALE
        if SOFTCAP > 0:
            scores = SOFTCAP * (2 * tl.sigmoid(2 * scores / SOFTCAP) - 1)
        is_visible = is_cached[None, :] & (cached[None, :] <= position[:, None])
        if WINDOW > 0:
            is_visible &= cached[None, :] > position[:, None] - WINDOW
        scores = tl.where(is_visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A row may have seen nothing yet; -inf minus -inf would be NaN.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp(scores - base[:, None])
        fade = tl.exp(highest - base)
        total = total * fade + tl.sum(weights, 1)
        sum_ = sum_ * fade[:, None] + tl.dot(
            weights.to(values.dtype), values, input_precision="ieee"
        )
        highest = new_highest

    num_heads = num_key_heads * GROUP
    out_row = query_row * num_heads + query_number
    if SPLITS == 1:
        # Rows beyond the tile have seen nothing and are not stored.
        result = sum_ / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            output + (out_row * VALUE_SIZE)[:, None] + value_lane[None, :],
            result.to(output.dtype.element_ty),
            mask=is_row[:, None] & is_value[None, :],
        )
    else:
        out_part = out_row * SPLITS + split
        tl.store(maxima + out_part, highest, mask=is_row)
        tl.store(sums + out_part * (VALUE_SIZE + 1) + VALUE_SIZE, total, mask=is_row)
        tl.store(
            sums + (out_part * (VALUE_SIZE + 1))[:, None] + value_lane[None, :],
            sum_,
            mask=is_row[:, None] & is_value[None, :],
        )


@triton.jit
def _combine(
    sums,
    maxima,
    output,
    VALUE_SIZE: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    lane = tl.arange(0, VALUE_LANES)
    highest = tl.load(maxima + row * SPLITS + split)
    # The first split holds the row's own token, so there is something above -inf.
    fade = tl.exp(highest - tl.max(highest, 0))
    part = sums + (row * SPLITS + split) * (VALUE_SIZE + 1)
    total = tl.sum(tl.load(part + VALUE_SIZE) * fade, 0)
    is_value = lane < VALUE_SIZE
    sum_ = tl.load(part[:, None] + lane[None, :], mask=is_value[None, :], other=0.0)
    result = tl.sum(sum_ * fade[:, None], 0) / total
    tl.store(output + row * VALUE_SIZE + lane, result.to(output.dtype.element_ty), mask=is_value)


@triton.jit
def _store(
    key,
    value,
    key_cache,
    value_cache,
    table,
    tiles,
    key_token,
    key_head,
    value_token,
    value_head,
    table_row,
    TOKENS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    num_key_heads = tl.num_programs(1)
    sequence = tl.load(tiles + tile * 4)
    first = tl.load(tiles + tile * 4 + 1)
    start = tl.load(tiles + tile * 4 + 2)
    count = tl.load(tiles + tile * 4 + 3)
    token = tl.arange(0, TOKENS)
    is_token = token < count
    position = start + token
    page = tl.load(table + sequence * table_row + position // PAGE_SIZE, mask=is_token, other=0).to(
        tl.int64
    )
    place = (page * PAGE_SIZE + position % PAGE_SIZE) * num_key_heads + head
    row = (first + token).to(tl.int64)
    lane = tl.arange(0, KEY_LANES)
    mask = is_token[:, None] & (lane < KEY_SIZE)[None, :]
    numbers = tl.load(key + (row * key_token + head * key_head)[:, None] + lane[None, :], mask=mask)
    tl.store(key_cache + (place * KEY_SIZE)[:, None] + lane[None, :], numbers, mask=mask)
    lane = tl.arange(0, VALUE_LANES)
    mask = is_token[:, None] & (lane < VALUE_SIZE)[None, :]
    numbers = tl.load(
        value + (row * value_token + head * value_head)[:, None] + lane[None, :], mask=mask
    )
    tl.store(value_cache + (place * VALUE_SIZE)[:, None] + lane[None, :], numbers, mask=mask)
