"""The cache: memory only for what is written, and slots that stay apart."""

from pathlib import Path

import torch

from tests.support.engines import CPU
from workers.model.attention import Stretch, _slot_runs
from workers.model.kv_cache import LayerShape, SlotCache


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def build(num_slots: int, max_tokens: int) -> SlotCache:
    return SlotCache(
        {0: LayerShape(2, 64, 64)},
        num_slots=num_slots,
        max_tokens=max_tokens,
        dtype=torch.float32,
        device=CPU,
    )


def test_only_written_positions_take_memory() -> None:
    """A gigabyte of slots is reserved, a few pages are used."""
    before = resident_bytes()
    cache = build(num_slots=64, max_tokens=16_384)
    ones = torch.ones(10, 2, 64)
    cache.write_stretch(0, 63, 100, ones, ones)
    keys, values = cache.read(0, 63, 1, 110)
    assert keys.shape == values.shape == (1, 2, 110, 64)
    assert keys[0, :, :100].count_nonzero() == 0
    assert (values[0, :, 100:] == 1).all()
    assert resident_bytes() - before < 50_000_000


def test_rows_and_stretches_land_in_the_same_places() -> None:
    by_rows, by_stretch = build(4, 16), build(4, 16)
    keys, values = torch.randn(3, 2, 64), torch.randn(3, 2, 64)
    by_stretch.write_stretch(0, 2, 5, keys, values)
    index = by_rows.row_index(2, torch.tensor([2, 2, 2]), torch.tensor([5, 6, 7]))
    by_rows.write_rows(0, index, keys, values)
    for one, other in zip(by_rows.read(0, 0, 4, 16), by_stretch.read(0, 0, 4, 16), strict=True):
        assert torch.equal(one, other)


def test_scrub_clears_those_positions_only() -> None:
    cache = build(2, 8)
    bad = torch.full((4, 2, 64), float("nan"))
    cache.write_stretch(0, 0, 0, torch.ones_like(bad), torch.ones_like(bad))
    cache.write_stretch(0, 0, 2, bad, bad)
    cache.write_stretch(0, 1, 0, torch.ones_like(bad), torch.ones_like(bad))
    cache.scrub(0, 2, 6)
    keys, _ = cache.read(0, 0, 2, 8)
    assert (keys[0, :, :2] == 1).all()
    assert (keys[0, :, 2:] == 0).all()
    assert (keys[1, :, :4] == 1).all()


def test_a_prefix_is_copied_and_no_more() -> None:
    cache = build(3, 8)
    keys, values = torch.randn(6, 2, 64), torch.randn(6, 2, 64)
    cache.write_stretch(0, 2, 0, keys, values)
    cache.copy(2, 0, 4)
    copied_keys, copied_values = cache.read(0, 0, 1, 8)
    assert torch.equal(copied_keys[0, :, :4], keys[:4].transpose(0, 1))
    assert torch.equal(copied_values[0, :, :4], values[:4].transpose(0, 1))
    assert copied_keys[0, :, 4:].count_nonzero() == 0


def runs(*rows: tuple[int, int]) -> list[tuple[int, int, list[int]]]:
    stretches = [Stretch(slot, length - 1, 1) for slot, length in rows]
    return [(run.first_row, run.first_slot, run.lengths) for run in _slot_runs(stretches)]


def test_neighbouring_slots_share_an_attention_call() -> None:
    assert runs((0, 10), (1, 20), (2, 15)) == [(0, 0, [10, 20, 15])]


def test_a_gap_between_slots_ends_a_call() -> None:
    assert runs((0, 10), (2, 10), (3, 10)) == [(0, 0, [10]), (1, 2, [10, 10])]


def test_a_long_row_does_not_make_short_ones_read_its_length() -> None:
    """Padding eight rows of 100 to 1,000 positions would cost far more than two more calls."""
    rows = [(slot, 1000 if slot == 4 else 100) for slot in range(8)]
    assert [len(run[2]) for run in runs(*rows)] == [4, 1, 3]
