"""Linears that read the same input, as one matrix product: queries, keys and values; gate and up.

On a GPU a small product takes as long as its launch and its ramp, so three of them in one take
little more than one. The modules of transformers stay as they are: the first of the siblings, which
every architecture calls first, computes for all; the others hand out their part.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere

_FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of siblings, in the order in which all models of transformers call them."""


class _First(torch.nn.Module):
    """Computes the product of all siblings and keeps the parts of the others."""

    def __init__(self, linears: list[torch.nn.Linear]) -> None:
        super().__init__()
        weights = torch.cat([linear.weight.data for linear in linears])
        biases = [bias.data for linear in linears if (bias := _bias(linear)) is not None]
        self.weight = torch.nn.Parameter(weights, requires_grad=False)
        self.bias = torch.nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self.sizes = [linear.out_features for linear in linears]
        self.others: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Not "first, *others = …": the compiler of torch 2.11 makes a tuple of them.
        self.others = list(F.linear(x, self.weight, self.bias).split(self.sizes, -1))
        return self.others.pop(0)


class _Other(torch.nn.Module):
    def __init__(self, first: _First) -> None:
        super().__init__()
        # In a list: the first is no part of this module, or its weights would count twice.
        self.first = [first]

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - the first had the same
        return self.first[0].others.pop(0)


def fuse_linears(model: torch.nn.Module) -> int:
    """Fuse all siblings in ``model``, in place; returns how many families there were.

    The result must be checked: that siblings read the same input shows only in what they compute.
    """
    fused = 0
    for parent in list(model.modules()):
        for names in _FAMILIES:
            linears = [getattr(parent, name, None) for name in names]
            plain = [linear for linear in linears if type(linear) is torch.nn.Linear]
            if len(plain) < len(names) or not _is_family(plain):
                continue
            first = _First(plain)
            setattr(parent, names[0], first)
            for name in names[1:]:
                setattr(parent, name, _Other(first))
            fused += 1
    return fused


def _is_family(linears: list[torch.nn.Linear]) -> bool:
    return (
        len({linear.in_features for linear in linears}) == 1
        and len({_bias(linear) is None for linear in linears}) == 1
    )


def _bias(linear: torch.nn.Linear) -> torch.nn.Parameter | None:
    return linear.bias  # which torch annotates as always there
