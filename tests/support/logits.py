"""Logits for comparison: of whole sequences, from steps that cut and mix them in every way."""

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere

from workers.model.attention import Stretch
from workers.model.runner import Forward

NUM_SEQUENCES = 3
"""That :func:`compute_in_pieces` takes; it needs four slots."""

_SLOTS = (3, 0, 2)
_PACES = ((40, 1), (1, 1, 33), (7, 1, 20))


def compute_in_pieces(forward: Forward, sequences: list[list[int]]) -> torch.Tensor:
    """Logits of all positions, ``[sequences, length, vocabulary]``: each of the equally long
    sequences gets through its tokens at a pace of its own, chunks beside single tokens. The slots
    are not those of the sequences.
    """
    length = len(sequences[0])
    done = [0] * NUM_SEQUENCES
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    step = 0
    while any(count < length for count in done):
        pieces: list[tuple[int, int]] = []
        for number, pace in enumerate(_PACES):
            count = min(pace[step % len(pace)], length - done[number])
            if count > 0:
                pieces.append((number, count))
        # As the runner orders them: single tokens first, by slot.
        pieces.sort(key=lambda piece: (piece[1] > 1, _SLOTS[piece[0]]))
        tokens = [t for n, count in pieces for t in sequences[n][done[n] : done[n] + count]]
        stretches = [Stretch(_SLOTS[n], done[n], count) for n, count in pieces]
        with torch.inference_mode():
            found = forward(tokens, stretches, list(range(len(tokens)))).float().clone()
        for (number, count), part in zip(
            pieces, found.split([count for _, count in pieces]), strict=True
        ):
            logits[number].append(part)
            done[number] += count
        step += 1
    return torch.stack([torch.cat(parts) for parts in logits])


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of the next token's distribution, in nats."""
    logs = (actual.float().log_softmax(-1), expected.float().log_softmax(-1))
    return F.kl_div(*logs, log_target=True, reduction="none").sum(-1).mean().item()
