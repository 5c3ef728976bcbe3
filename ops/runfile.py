"""The files by which one start of Headrace is found again: ``lock`` and ``state.json`` in ``run/``,
and ``prometheus-targets.json``, by which Prometheus finds it.

The lock belongs to the supervisor for as long as it lives; the kernel drops it however it dies. The
state file says what the supervisor runs, for ``headrace status``; without the lock it is history.
"""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import click
import msgspec

from common.settings import Settings


class ProcessState(msgspec.Struct, frozen=True):
    """One supervised process. ``instance`` is its name in Redis and logs, "" before it said so."""

    role: str
    name: str
    state: str
    pid: int = 0
    instance: str = ""
    restarts: int = 0
    started: str = ""
    address: str = ""


class RunState(msgspec.Struct, frozen=True):
    """What ``headrace up`` runs right now."""

    pid: int
    started: str
    redis_url: str
    model: str
    processes: list[ProcessState]


class Target(msgspec.Struct, frozen=True):
    """One place where figures are read, as Prometheus' ``file_sd_configs`` has it."""

    targets: list[str]
    labels: dict[str, str]


class DataDirInUse(click.ClickException):
    """Another supervisor holds the lock of this data directory."""


@contextmanager
def lock(data_dir: Path) -> Generator[None]:
    """Hold the data directory for this process.

    Raises: DataDirInUse, with the other one's pid in its message.
    """
    path = run_dir(data_dir) / "lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise DataDirInUse(
                f"{data_dir} is in use by another `headrace up` (pid {holder}); "
                "stop that one, or name another --data-dir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def write_state(data_dir: Path, state: RunState) -> None:
    """Replace the state file in one step: a reader sees the old or the new one, never a half."""
    _replace(run_dir(data_dir) / "state.json", state)


def write_targets(data_dir: Path, targets: list[Target]) -> None:
    """Say where the figures of this start are read. Prometheus reads the file whenever it changes.

    Names stay the same over restarts of a process, so one series goes on. The file stays when all
    has stopped: then Prometheus shows that nothing is up.
    """
    _replace(targets_path(data_dir), targets)


def targets_path(data_dir: Path) -> Path:
    return run_dir(data_dir) / "prometheus-targets.json"


def _replace(path: Path, content: object) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))
    fresh.replace(path)


def forget_state(data_dir: Path) -> None:
    (run_dir(data_dir) / "state.json").unlink(missing_ok=True)


def read_state(data_dir: Path) -> RunState | None:
    """What a supervisor of this data directory runs; None when none is alive."""
    path = data_dir / "run" / "state.json"
    try:
        state = msgspec.json.decode(path.read_bytes(), type=RunState)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return state if _is_held(data_dir) else None


def redis_url_of(settings: Settings) -> str:
    """The Redis that the settings name; unless they do, that of the data directory's supervisor."""
    run = read_state(settings.data_dir)
    return (
        run.redis_url
        if run and "redis_url" not in settings.model_fields_set
        else (settings.redis_url)
    )


S = TypeVar("S", bound=Settings)


def joined(settings: S) -> S:
    """The settings; where they name no Redis or model, with those of the directory's supervisor."""
    unnamed = {"redis_url", "model"} - settings.model_fields_set
    run = read_state(settings.data_dir) if unnamed else None
    if run is None:
        return settings
    return settings.model_copy(update={name: getattr(run, name) for name in unnamed})


def run_dir(data_dir: Path) -> Path:
    """``<data-dir>/run``, made private to this user."""
    path = data_dir / "run"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _is_held(data_dir: Path) -> bool:
    with (data_dir / "run" / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
