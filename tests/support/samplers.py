"""Every way of choosing tokens that this machine has, by name."""

from functools import cache

from tests.support.native_kernels import are_runnable, library
from workers.model.native.binding import Engine
from workers.model.native.sampler import NativeSampler
from workers.model.sampler import Sampler, sample

SAMPLERS = ["torch", "native"] if are_runnable() else ["torch"]
"""test_native_binding.py fails where the kernels should be able to run and are not."""


@cache
def sampler(name: str) -> Sampler:
    """The one in torch, or the kernels' on two threads."""
    return sample if name == "torch" else NativeSampler(Engine(library("installed"), 2))
