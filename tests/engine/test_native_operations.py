"""Each operation of the kernels against float32 torch, on AVX512 and on emulated AMX."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.native_kernels import library, quantized
from workers.model.attention import Stretch
from workers.model.native.binding import Engine, Places

# Enough for all row counts around the register blocks; each example costs a few milliseconds.
fast = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", params=["installed", "emulated_amx"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    is_emulated = request.param == "emulated_amx"
    engine = Engine(library(request.param), 3, use_amx=is_emulated)
    assert engine.uses_amx == is_emulated
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=["installed", "emulated_amx"])
def quantizing(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine that packs weights in 8 bits."""
    engine = Engine(
        library(request.param), 3, use_amx=request.param == "emulated_amx", quantize=True
    )
    yield engine
    engine.close()


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(torch.bfloat16)


def assert_rounded(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to bfloat16: 8 bits of each value, and of the largest where values cancel."""
    size = float(expected.abs().max())
    torch.testing.assert_close(actual.float(), expected, rtol=2**-7, atol=size * 2**-8)


@fast
@given(
    num_rows=st.integers(1, 70),
    num_inputs=st.integers(1, 150),
    num_outputs=st.integers(1, 150),
    has_bias=st.booleans(),
)
@example(num_rows=1, num_inputs=32, num_outputs=32, has_bias=False)
@example(num_rows=14, num_inputs=64, num_outputs=96, has_bias=True)
@example(num_rows=15, num_inputs=2048, num_outputs=33, has_bias=True)
@example(num_rows=33, num_inputs=31, num_outputs=1, has_bias=False)
def test_linear_of_any_shape(
    engine: Engine, num_rows: int, num_inputs: int, num_outputs: int, has_bias: bool
) -> None:
    x = random(num_rows, num_inputs)
    weight = random(num_outputs, num_inputs, seed=1)
    bias = random(num_outputs, seed=2) if has_bias else None
    packed = engine.pack(weight, bias)
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    exact = engine.linear(packed, x, dtype=torch.float32)
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4 * math.sqrt(num_inputs))
    assert_rounded(engine.linear(packed, x), expected)


@fast
@given(
    num_rows=st.integers(1, 70),
    num_inputs=st.integers(1, 150),
    num_outputs=st.integers(1, 150),
    has_bias=st.booleans(),
)
@example(num_rows=1, num_inputs=32, num_outputs=32, has_bias=False)
@example(num_rows=10, num_inputs=64, num_outputs=96, has_bias=True)
@example(num_rows=11, num_inputs=2048, num_outputs=33, has_bias=True)
@example(num_rows=33, num_inputs=31, num_outputs=1, has_bias=False)
def test_quantized_linear_of_any_shape(
    quantizing: Engine, num_rows: int, num_inputs: int, num_outputs: int, has_bias: bool
) -> None:
    """What the numbers times their scales give; for many rows, that is rounded to bfloat16."""
    x = random(num_rows, num_inputs)
    weight = quantized(random(num_outputs, num_inputs, seed=1))
    weight[::7] = 0.0  # the scale of nothing
    bias = random(num_outputs, seed=2) if has_bias else None
    packed = quantizing.pack(weight, bias)
    exact = quantizing.linear(packed, x, dtype=torch.float32)
    stored = quantized(weight.bfloat16())
    expected = F.linear(x.float(), stored, None if bias is None else bias.float())
    rounding = F.linear(x.float().abs(), stored.abs()) * 2**-8
    assert ((exact - expected).abs() <= rounding + 1e-5).all()


@pytest.mark.parametrize("num_rows", [1, 37])
def test_quantized_gated_mlp(quantizing: Engine, num_rows: int) -> None:
    gate, up = random(2, 33, 70).unbind()
    down, x = random(70, 33, seed=1), random(num_rows, 70, seed=3, scale=0.3)
    inside = F.silu(F.linear(x.float(), quantized(gate))) * F.linear(x.float(), quantized(up))
    output = quantizing.gated_mlp(quantizing.pack_gated(gate, up), quantizing.pack(down), "silu", x)
    expected = F.linear(inside, quantized(down))
    assert (output.float() - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("quantize", [False, True])
def test_tiles_are_left_out_for_few_rows(quantize: bool) -> None:
    """They would compute 16. What registers add up differs from what tiles do in the last bits."""
    x, weight = random(3, 1000), random(64, 1000, seed=1)
    on_tiles = Engine(library("emulated_amx"), 2, quantize=quantize)
    without = Engine(library("emulated_amx"), 2, use_amx=False, quantize=quantize)
    for count, is_same in ((1, True), (2, True), (3, False)):
        one, other = (
            engine.linear(engine.pack(weight), x[:count], dtype=torch.float32)
            for engine in (on_tiles, without)
        )
        assert torch.equal(one, other) == is_same


def test_leading_dimensions_stay(engine: Engine) -> None:
    packed = engine.pack(random(10, 20))
    x = random(2, 3, 40)[..., ::2]  # not contiguous either
    assert torch.equal(engine.linear(packed, x)[1, 2], engine.linear(packed, x[1, 2]))


def test_one_row_with_nan_spoils_no_other(engine: Engine) -> None:
    """A sequence gone wrong must not reach its neighbours in the batch."""
    packed = engine.pack(random(40, 50))
    x = random(20, 50)
    clean = engine.linear(packed, x)
    x[7] = math.nan
    spoilt = engine.linear(packed, x)
    assert spoilt[7].isnan().all()
    others = torch.arange(20) != 7
    assert torch.equal(spoilt[others], clean[others])


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(("hidden", "inner", "num_rows"), [(64, 96, 3), (70, 33, 37), (8, 15, 1)])
def test_gated_mlp(
    engine: Engine, activation: str, hidden: int, inner: int, num_rows: int, has_bias: bool
) -> None:
    gate, up = random(2, inner, hidden).unbind()
    down = random(hidden, inner, seed=1)
    biases = random(3, inner, seed=2) if has_bias else [None] * 3
    x = random(num_rows, hidden, seed=3, scale=0.3)
    functions = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    }
    down_bias = random(hidden, seed=4) if has_bias else None

    def linear(y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(y, weight.float(), None if bias is None else bias.float())

    inside = functions[activation](linear(x.float(), gate, biases[0]))
    expected = linear(inside * linear(x.float(), up, biases[1]), down, down_bias)
    gate_up = engine.pack_gated(gate, up, biases[0], biases[1])
    assert_rounded(engine.gated_mlp(gate_up, engine.pack(down, down_bias), activation, x), expected)


@fast
@given(num_rows=st.integers(1, 9), width=st.integers(1, 200))
@example(num_rows=80, width=576)
def test_norms(engine: Engine, num_rows: int, width: int) -> None:
    x = random(num_rows, width)
    weight, bias = random(2, width, seed=1).float().unbind()
    expected = F.rms_norm(x.float(), (width,), weight, 1e-5)
    assert_rounded(engine.rms_norm(x, weight, 1e-5), expected)
    # A variance of almost nothing cannot be told from rounding.
    if width > 4:
        for w, b in ((weight, bias), (weight, None), (None, None)):
            expected = F.layer_norm(x.float(), (width,), w, b, 1e-5)
            assert_rounded(engine.layer_norm(x, w, b, 1e-5), expected)


def plain_attention(
    keys: torch.Tensor,
    values: torch.Tensor,
    stretches: list[Stretch],
    query: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Stretch by stretch over a cache that holds everything, in float32."""
    outputs: list[torch.Tensor] = []
    group = query.shape[1] // keys.shape[1]
    for stretch in stretches:
        first = sum(len(output) for output in outputs)
        q = query[first : first + stretch.count].float().transpose(0, 1)
        end = stretch.start + stretch.count
        k, v = (
            cached[stretch.slot, :, :end].float().repeat_interleave(group, 0)
            for cached in (keys, values)
        )
        scores = q @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position, cached = torch.arange(stretch.start, end)[:, None], torch.arange(end)
        visible = cached <= position
        if window is not None:
            visible &= cached > position - window
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


MIXED = [
    Stretch(2, 0, 1),
    Stretch(3, 17, 1),
    Stretch(5, 300, 1),
    Stretch(6, 128, 1),
    Stretch(0, 0, 2),
    Stretch(1, 30, 70),
    Stretch(4, 299, 11),
]
"""Decode rows of all lengths around the spans, and prefill from the start and far behind it."""

MAX_TOKENS = 310


def check_attention(
    engine: Engine,
    stretches: list[Stretch],
    *,
    num_heads: int,
    num_kv_heads: int,
    size: int,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """New tokens come with the step, older ones are cached, and behind the end lies NaN."""
    shape = (7, num_kv_heads, MAX_TOKENS, size)
    full_keys, full_values = random(*shape, seed=1), random(*shape, seed=2)
    cache = (full_keys.clone(), full_values.clone())
    new: list[list[torch.Tensor]] = [[], []]
    for stretch in stretches:
        end = stretch.start + stretch.count
        for cached, full, tokens in zip(cache, (full_keys, full_values), new, strict=True):
            tokens.append(full[stretch.slot, :, stretch.start : end].transpose(0, 1))
            cached[stretch.slot, :, stretch.start :] = math.nan
    key, value = (torch.cat(tokens) for tokens in new)
    # As transformers hands them over: heads before tokens in memory.
    query = random(num_heads, len(key), size, seed=3).transpose(0, 1)
    places = Places(stretches)
    scale = size**-0.5
    output = engine.attend(
        places, cache, query, key, value, scale=scale, window=window, softcap=softcap
    )
    expected = plain_attention(
        full_keys, full_values, stretches, query, scale=scale, window=window, softcap=softcap
    )
    assert_rounded(output, expected)
    for cached, full in zip(cache, (full_keys, full_values), strict=True):
        for stretch in stretches:
            end = stretch.start + stretch.count
            assert torch.equal(cached[stretch.slot, :, :end], full[stretch.slot, :, :end])


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (1, 1), (14, 2), (16, 1)])
@pytest.mark.parametrize("size", [64, 128, 16, 40, 80, 96, 256])
def test_attention_of_any_head_size_and_group(
    engine: Engine, size: int, num_heads: int, num_kv_heads: int
) -> None:
    check_attention(engine, MIXED, num_heads=num_heads, num_kv_heads=num_kv_heads, size=size)


@pytest.mark.parametrize("size", [64, 128, 48])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [1, 5, 33, 200, 1000])
def test_attention_in_a_window_and_with_a_softcap(
    engine: Engine, window: int, softcap: float | None, size: int
) -> None:
    check_attention(
        engine, MIXED, num_heads=6, num_kv_heads=2, size=size, window=window, softcap=softcap
    )


@fast
@given(data=st.data())
def test_attention_of_any_step(engine: Engine, data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=7, unique=True))
    stretches: list[Stretch] = []
    for slot in slots:
        start = data.draw(st.integers(0, MAX_TOKENS - 1))
        longest = min(100, MAX_TOKENS - start)
        count = data.draw(st.one_of(st.just(1), st.integers(1, longest)))
        stretches.append(Stretch(slot, start, count))
    window = data.draw(st.none() | st.integers(1, 64))
    check_attention(engine, stretches, num_heads=4, num_kv_heads=2, size=64, window=window)


def test_a_wrong_shape_is_refused(engine: Engine) -> None:
    packed = engine.pack(random(4, 8))
    with pytest.raises(ValueError, match="rows of 8"):
        engine.linear(packed, random(2, 9))
    with pytest.raises(ValueError, match="rows of 8"):
        engine.linear(packed, random(2, 8).float())
    query, places = random(2, 1, 16), Places([Stretch(0, 0, 3)])
    cache = (random(1, 1, 8, 16), random(1, 1, 8, 16))
    with pytest.raises(ValueError, match="stretches of 3"):
        engine.attend(places, cache, query, query, query, scale=1.0)


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_engines_live_beside_one_another_and_leave_nothing() -> None:
    """Two teams in turn, both larger than the machine; closing one ends its threads only."""
    before = num_threads()
    first, second = (Engine(library("installed"), 5) for _ in range(2))
    assert num_threads() == before + 8
    x, weight = random(3, 64), random(500, 64)
    one, other = first.pack(weight), second.pack(weight)
    for _ in range(50):
        assert torch.equal(first.linear(one, x), second.linear(other, x))
    expected = first.linear(one, x)
    second.close()
    assert num_threads() == before + 4
    assert torch.equal(first.linear(one, x), expected)
    first.close()
    assert num_threads() == before
    with pytest.raises(ValueError, match="closed"):
        first.linear(one, x)
