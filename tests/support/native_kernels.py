"""The kernels for tests: as installed, and with AMX in software for machines without it."""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from fcntl import LOCK_EX, flock
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere

from workers.model.native.binding import Library, Unavailable, load, open_library

ROOT = Path(__file__).resolve().parents[2]
_FOLDER = ROOT / "workers" / "model" / "native"
_SOURCES = [_FOLDER / "kernels.cpp", _FOLDER / "sampler.cpp"]
_EMULATION = ROOT / "tests" / "support" / "amx_emulation.h"
_FLAGS = (
    *("-std=c++20", "-O1", "-shared", "-fPIC", "-pthread"),
    *("-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi", "-w"),
)


def quantized(weight: torch.Tensor) -> torch.Tensor:
    """What 8 bits leave of ``weight``, ``[outputs, inputs]``: for each 32 inputs whole numbers of
    a scale, which is rounded up to bfloat16.
    """
    num_outputs, num_inputs = weight.shape
    groups = F.pad(weight.float(), (0, -num_inputs % 32)).view(num_outputs, -1, 32)
    bits = (groups.abs().amax(-1, keepdim=True) / 127).view(torch.int32)
    scales = (bits + 0xFFFF >> 16 << 16).view(torch.float32)
    numbers = (groups / scales).nan_to_num().round()
    return (numbers * scales).flatten(1)[:, :num_inputs]


def are_runnable() -> bool:
    """Whether the kernels were built and run here; test_native_binding.py says if they should."""
    return isinstance(load(), Library)


@cache
def library(name: str) -> Library:
    """``installed``, or ``emulated_amx``, which is compiled once per state of its sources."""
    found = load() if name == "installed" else open_library(_emulated_amx())
    assert not isinstance(found, Unavailable), found.reason
    return found


def _emulated_amx() -> Path:
    read = sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h"), _EMULATION])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()[:16]
    library = ROOT / "var" / "test-kernels" / f"{digest}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    # Test processes that start together wait for the one that compiles.
    with library.with_suffix(".lock").open("w") as lock:
        flock(lock, LOCK_EX)
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            flags = (*_FLAGS, "-DHEADRACE_EMULATE_AMX", f"-I{_EMULATION.parent}")
            compile_shared(_SOURCES, unfinished, *flags)
            unfinished.replace(library)
    return library


def compile_shared(sources: Sequence[Path], to: Path, *flags: str) -> None:
    """Compile C++ files to a shared library."""
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(to)], check=True)
