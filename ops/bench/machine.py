"""The machine that figures were measured on, in the words of a table's caption."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What decides how fast a model runs here."""

    processor: str
    cores: int
    instructions: list[str]
    """Of those that matrix products use, the ones there are."""
    memory_gib: float
    system: str
    python: str
    torch: str

    def __str__(self) -> str:
        with_ = f" with {', '.join(self.instructions)}" if self.instructions else ""
        return (
            f"{self.cores} cores of {self.processor}{with_}, {self.memory_gib:.0f} GiB, "
            f"{self.system}, Python {self.python}, torch {self.torch}"
        )


def describe() -> Machine:
    cpu = _cpu_info()
    flags = set(cpu.get("flags", "").split())
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = "none"
    return Machine(
        processor=cpu.get("model name") or platform.processor() or platform.machine(),
        cores=num_cores(),
        instructions=[
            shown
            for flag, shown in (
                ("avx2", "AVX2"),
                ("avx512f", "AVX512"),
                ("avx512_bf16", "AVX512-bf16"),
                ("amx_bf16", "AMX"),
            )
            if flag in flags
        ],
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch_version,
    )


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_info() -> dict[str, str]:
    """The first processor's entry of ``/proc/cpuinfo``; empty where the system has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
