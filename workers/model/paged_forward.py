"""The way for CUDA: a paged cache, compiled modules, and recorded steps.

Launching a step kernel by kernel takes the processor longer than the GPU needs to compute it, so
steps are replayed from CUDA graphs, recorded at load: one per size of batch for steps of decode
rows alone, as nearly all are, and one per number of tokens for those with prompts. What runs is
padded to the next size with rows, tokens and tiles that store nothing. All numbers that differ from
step to step lie in tensors and go over in one copy from pinned memory, and in a second one when
pages have changed hands.

On a device without graphs the very same padded steps run unrecorded, which is how they are tested.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from transformers import PreTrainedModel

from workers.engine.scheduler import SPARE_ROWS
from workers.model.adapters import ModuleAdapters
from workers.model.attention import Stretch, running
from workers.model.paged_attention import PAGED_ATTENTION, TILE_TOKENS, PagedLayout
from workers.model.paged_cache import PagedCache

_BATCHES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Sizes of recorded batches. A single row is padded to two: to the compiler, one is a case of its
own and would have to be compiled as well."""

_FEWEST_TOKENS = 64
"""In a recorded step with prompts: below that a step takes as long as its weights take to read."""


class PagedForward:
    """Implements :class:`workers.model.runner.Forward`.

    Args:
        model: on the cache's device; from now on it attends to pages.
        cache: where keys and values go.
        max_sequences: most stretches in one step.
        max_tokens: longest sequence.
        step_tokens: most tokens in one step.
        compiler: the backend of ``torch.compile``; None runs the modules as they are.
        records: whether steps become CUDA graphs, where the device has them.

    The first start on a machine waits for the compiler; after that torch finds most of its work in
    its cache on disk (``TORCHINDUCTOR_CACHE_DIR``). ``TORCH_COMPILE_DISABLE=1`` does without.
    """

    name = "cuda"

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        *,
        max_sequences: int,
        max_tokens: int,
        step_tokens: int,
        compiler: str | None = "inductor",
        records: bool = True,
    ) -> None:
        model.set_attn_implementation(PAGED_ATTENTION)
        self._model = model
        self._cache = cache
        self._batches = batch_sizes(max_sequences)
        self._lengths = token_sizes(max(step_tokens, _FEWEST_TOKENS))
        self._numbers = _StepNumbers(
            num_sequences=self._batches[-1],
            num_rows=self._batches[-1] + SPARE_ROWS,
            num_tokens=max(self._lengths[-1], 2 * self._batches[-1]),
            num_pages=-(-max_tokens // cache.page_size),
            device=cache.device,
        )
        self.adapters = ModuleAdapters(model)
        self._compute = self._run_modules
        self.uncompiled_reason = self._compile(compiler) if compiler else "turned off"
        """Why the modules do not run compiled; None where they do."""
        self._decodes: dict[int, Callable[[], torch.Tensor]] = {}
        self._mixed: dict[int, Callable[[], torch.Tensor]] = {}
        self.is_recorded = self._record(records=records)
        """Whether steps are graphs; False where something in the model cannot be recorded, or the
        device has none."""

    def __call__(
        self, tokens: list[int] | torch.Tensor, stretches: Sequence[Stretch], rows: list[int]
    ) -> torch.Tensor:
        """See the protocol. ``tokens`` may lie on the device, ``[tokens]`` of any type, and need
        not be computed yet. The logits are good until the next step: they lie in memory that all
        steps share.
        """
        num_decodes = sum(stretch.count == 1 for stretch in stretches)
        self._numbers.load(tokens, stretches, num_decodes, rows)
        if any(stretch.adapter for stretch in stretches):
            return self._run_adapted(stretches, num_decodes, len(tokens), len(rows))
        steps = self._decodes if num_decodes == len(tokens) else self._mixed
        return steps[self.num_places(len(tokens), num_decodes)]()[: len(rows)]

    def num_places(self, num_tokens: int, num_decodes: int) -> int:
        """Token places of a recorded step that has room for ``num_tokens``, of which
        ``num_decodes`` are decode rows.
        """
        sizes = self._batches if num_decodes == num_tokens else self._lengths
        return _next(sizes, num_tokens)

    def _run_adapted(
        self, stretches: Sequence[Stretch], num_decodes: int, num_tokens: int, num_rows: int
    ) -> torch.Tensor:
        """The step as it is, by the modules one by one: hooks on them know which rows are whose."""
        num_tiles = sum(-(-stretch.count // TILE_TOKENS) for stretch in stretches[num_decodes:])
        step = self._step(num_tokens, num_decodes, num_tiles, max(1, num_rows), self._run_modules)
        with self.adapters.computing(stretches):
            return step()[:num_rows]

    def _run_modules(
        self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """``tokens`` and ``positions`` are ``[tokens]``, ``rows`` those whose logits are wanted."""
        output = self._model(
            input_ids=tokens.long()[None],
            position_ids=positions.long()[None],
            use_cache=False,
            logits_to_keep=rows.long(),
        )
        return output.logits[0]

    def _compile(self, backend: str) -> str | None:
        compiled = torch.compile(self._run_modules, dynamic=True, fullgraph=True, backend=backend)
        size = self._batches[-1]
        # Not as many rows as tokens: of equal numbers the compiler would take them for one.
        step = self._step(2 * size, size, 0, size, compiled)
        try:
            with torch.inference_mode():
                step()
        except Exception as error:  # noqa: BLE001 - the modules run without a compiler, too
            return f"{type(error).__name__}: {error}"
        self._compute = compiled
        return None

    def _record(self, *, records: bool) -> bool:
        """Prepare each step, the largest first: the others then find room in its memory."""
        has_graphs = records and self._cache.device.type == "cuda"
        pool = torch.cuda.graph_pool_handle() if has_graphs else None
        is_recorded = pool is not None
        for size in reversed(self._lengths):
            step, done = _recorded(self._mixed_step(size), pool)
            self._mixed[size], is_recorded = step, is_recorded and done
        for size in reversed(self._batches):
            step, done = _recorded(self._decode_step(size), pool)
            self._decodes[size], is_recorded = step, is_recorded and done
        return is_recorded

    def _decode_step(self, size: int) -> Callable[[], torch.Tensor]:
        return self._step(size, size, 0, size, self._compute)

    def _mixed_step(self, size: int) -> Callable[[], torch.Tensor]:
        """Room for all decode rows beside prompts, and for logits of everybody."""
        num_sequences = self._batches[-1]
        num_tiles = min(size // 2, size // TILE_TOKENS + num_sequences)
        num_rows = num_sequences + SPARE_ROWS
        return self._step(size, min(size, num_sequences), num_tiles, num_rows, self._compute)

    def _step(
        self,
        num_tokens: int,
        num_decodes: int,
        num_tiles: int,
        num_rows: int,
        compute: Callable[..., torch.Tensor],
    ) -> Callable[[], torch.Tensor]:
        numbers = self._numbers
        layout = PagedLayout(
            self._cache, numbers.lengths[:num_decodes], numbers.tiles[:num_tiles], numbers.table
        )
        tokens, positions = numbers.tokens[:num_tokens], numbers.positions[:num_tokens]
        rows = numbers.rows[:num_rows]

        def step() -> torch.Tensor:
            with running(layout):
                return compute(tokens, positions, rows)

        return step


def batch_sizes(max_sequences: int) -> list[int]:
    """Sizes of decode batches, ascending; the last one holds ``max_sequences``."""
    sizes = [size for size in _BATCHES if size < max_sequences]
    return [*sizes, next((size for size in _BATCHES if size >= max_sequences), max_sequences)]


def token_sizes(step_tokens: int) -> list[int]:
    """Sizes of steps with prompts, ascending; at most a third of one is padding."""
    sizes: list[int] = []
    size = _FEWEST_TOKENS
    while size < step_tokens:
        sizes += [size, size * 3 // 2]
        size *= 2
    return [*(size for size in sizes if size < step_tokens), step_tokens]


def _next(sizes: list[int], count: int) -> int:
    return next(size for size in sizes if size >= count)


def _recorded(
    step: Callable[[], torch.Tensor], pool: tuple[int, int] | None
) -> tuple[Callable[[], torch.Tensor], bool]:
    """A graph of ``step``; ``step`` itself where there are none or it cannot be recorded."""

    def unrecorded() -> torch.Tensor:
        # Should the compiler think anew about what it took before, then not in mid-traffic.
        with torch.compiler.set_stance("eager_on_recompile"):
            return step()

    with torch.inference_mode():
        step()  # whatever is prepared on first use must not be part of the recording
        if pool is None:
            return unrecorded, False
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):  # pyright: ignore[reportArgumentType] - a nominal type
                logits = step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return unrecorded, False

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay, True


class _StepNumbers:
    """All integers of a step, on the host and on the device, at the same places in every step."""

    def __init__(
        self,
        *,
        num_sequences: int,
        num_rows: int,
        num_tokens: int,
        num_pages: int,
        device: torch.device,
    ) -> None:
        num_tiles = num_sequences + num_tokens // TILE_TOKENS
        sizes = [num_tokens, num_tokens, num_sequences, num_rows, num_tiles * 4]
        self._num_head = sum(sizes)
        total = self._num_head + num_sequences * num_pages
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=is_cuda)
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        self._sent = torch.cuda.Event() if is_cuda else None
        host = [part.numpy() for part in self._host[: self._num_head].split(sizes)]
        self._tokens, self._positions, self._lengths, self._rows, self._tiles = host
        self._table = self._host[self._num_head :].view(num_sequences, num_pages).numpy()
        self._pages: list[tuple[int, ...]] = [()] * num_sequences
        """What each row of the table holds."""
        parts = self._device[: self._num_head].split(sizes)
        self.tokens, self.positions, self.lengths, self.rows = parts[:4]
        self.tiles = parts[4].view(-1, 4)
        self.table = self._device[self._num_head :].view(num_sequences, num_pages)

    def load(
        self,
        tokens: list[int] | torch.Tensor,
        stretches: Sequence[Stretch],
        num_decodes: int,
        rows: list[int],
    ) -> None:
        """Send what the step is.

        Padding tokens keep an old number, which does no harm: nobody attends to them. Padding rows
        have no length and padding tiles no tokens.
        """
        if self._sent is not None:
            self._sent.synchronize()  # the last copy has read what is overwritten now
        if not isinstance(tokens, torch.Tensor):
            self._tokens[: len(tokens)] = tokens
        self._positions[:num_decodes] = [stretch.start for stretch in stretches[:num_decodes]]
        self._lengths[:num_decodes] = self._positions[:num_decodes] + 1
        self._lengths[num_decodes:] = 0
        self._rows[: len(rows)] = rows
        self._rows[len(rows) :] = 0
        if num_decodes < len(stretches):
            prompts = stretches[num_decodes:]
            self._positions[num_decodes : len(tokens)] = [
                position for s in prompts for position in range(s.start, s.end)
            ]
            tiles = list(chain.from_iterable(_tiles(prompts, num_decodes)))
            self._tiles[: len(tiles)] = tiles
            self._tiles[len(tiles) :] = 0
        self._send([stretch.pages for stretch in stretches])
        if isinstance(tokens, torch.Tensor):
            self.tokens[: len(tokens)].copy_(tokens)

    def _send(self, pages: list[tuple[int, ...]]) -> None:
        head = self._num_head
        self._device[:head].copy_(self._host[:head], non_blocking=True)
        if self._update_table(pages):
            self._device[head:].copy_(self._host[head:], non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def _update_table(self, pages: list[tuple[int, ...]]) -> bool:
        """Write the rows that changed; the places keep one tuple for as long as it is right."""
        changed = [row for row, new in enumerate(pages) if new is not self._pages[row]]
        for row in changed:
            self._pages[row] = pages[row]
            self._table[row, : len(pages[row])] = pages[row]
        return bool(changed)


def _tiles(prompts: Sequence[Stretch], num_decodes: int) -> list[tuple[int, int, int, int]]:
    """(sequence, first token, its position, tokens) of stretches that stand behind decode rows."""
    tiles: list[tuple[int, int, int, int]] = []
    first = num_decodes
    for sequence, stretch in enumerate(prompts, num_decodes):
        tiles += [
            (sequence, first + done, stretch.start + done, min(TILE_TOKENS, stretch.count - done))
            for done in range(0, stretch.count, TILE_TOKENS)
        ]
        first += stretch.count
    return tiles
