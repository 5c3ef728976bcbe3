"""A Headrace of its own for a benchmark: `headrace up` in a folder that ends with it."""

import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from ops import runfile
from ops.bench.processes import running

_START_TIMEOUT_S = 180.0
_LOOK_S = 0.1


@contextmanager
def own_instance(
    *options: str, env: Mapping[str, str] | None = None, models: Path | None = None
) -> Generator[tuple[Path, list[str]]]:
    """`headrace up` with ``options`` on free ports; gives its data directory, and its addresses.

    Raises: click.ClickException when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        data_dir = Path(folder)
        with instance_in(data_dir, *options, env=env, models=models) as urls:
            yield data_dir, urls


@contextmanager
def instance_in(
    data_dir: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
    models: Path | None = None,
    program: Sequence[str] = ("ops.cli", "up"),
) -> Generator[list[str]]:
    """As :func:`own_instance`, in a directory that stays, with what it held; gives the addresses.

    ``models`` is a store's folder of models, to serve from as it is; ``program`` is the module to
    run, and its first arguments.

    Raises: click.ClickException when it does not start.
    """
    if models is not None:
        (data_dir / "models").symlink_to(models.resolve())
    command = [sys.executable, "-P", "-m", *program]
    command += ["--data-dir", str(data_dir), "--port", "0", *options]
    with _ended_by_sigterm(), running(command, env or {}, data_dir / "output") as process:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not _is_ready(data_dir, process.pid):
            if process.poll() is not None or time.monotonic() > deadline_s:
                output = (data_dir / "output").read_text(errors="replace")
                raise click.ClickException(
                    f"the instance to measure did not start: {output[-500:]}"
                )
            time.sleep(_LOOK_S)
        yield addresses(data_dir)


@contextmanager
def _ended_by_sigterm() -> Generator[None]:
    """While this lasts, SIGTERM ends this process in order: else what it started would outlive it.

    Only a main thread may ask for signals; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_ready(data_dir: Path, pid: int) -> bool:
    """Whether the supervisor ``pid`` has said so, and not one that was here before."""
    log = data_dir / "log" / "supervisor.jsonl"
    if not log.exists():
        return False
    said = (line for line in log.read_bytes().splitlines() if b'"supervisor.ready"' in line)
    return any(json.loads(line)["pid"] == pid for line in said)


def addresses(data_dir: Path) -> list[str]:
    """Where the gateways of the instance on ``data_dir`` are.

    Raises: click.ClickException when there is none.
    """
    state = runfile.read_state(data_dir)
    found = [p.address for p in state.processes if p.role == "gateway"] if state else []
    if not found:
        raise click.ClickException("the instance to measure ended at once")
    return found
