"""Servers under measurement as processes: start, stop, and what they use of the machine."""

import os
import signal
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Use:
    """What a process and all its descendants use: resident bytes now, processor time so far."""

    rss_bytes: dict[str, int]
    """By the processes' names (see :func:`_name`); equal names are added up."""
    cpu_s: dict[str, float]

    @property
    def total_rss_bytes(self) -> int:
        return sum(self.rss_bytes.values())


@contextmanager
def running(
    command: Sequence[str], env: Mapping[str, str], log_path: Path
) -> Generator[subprocess.Popen[bytes]]:
    """The command in a session of its own, its output in ``log_path``; all of it ends with us."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - the command is made in this package
            command,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end; whatever of its session is left after a while is killed."""
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def use_of(pid: int) -> Use:
    """What the tree of processes under ``pid`` uses; empty where the kernel has no ``/proc``."""
    rss_bytes: dict[str, int] = {}
    cpu_s: dict[str, float] = {}
    for member in _tree(pid):
        try:
            fields = _stat(member)
            name = _name(member)
        except OSError:
            continue
        rss_bytes[name] = rss_bytes.get(name, 0) + int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        ticks = int(fields[11]) + int(fields[12])
        cpu_s[name] = cpu_s.get(name, 0.0) + ticks / os.sysconf("SC_CLK_TCK")
    return Use(rss_bytes, cpu_s)


def busy_s() -> float:
    """Processor seconds that all of this machine has spent so far, idle time left out."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    return (sum(map(int, fields[:8])) - int(fields[3]) - int(fields[4])) / os.sysconf("SC_CLK_TCK")


def _tree(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            children.setdefault(int(_stat(int(path.name))[1]), []).append(int(path.name))
        except OSError:
            continue
    members, place = [root], 0
    while place < len(members):
        members += children.get(members[place], [])
        place += 1
    return members


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` behind the name, which may hold spaces: the state is 0."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text[text.rindex(")") + 2 :].split()


def _name(pid: int) -> str:
    """The module of ``python -m``, else the program: `gateway`, `workers`, `llama-server`."""
    command = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    program = Path(command[0].split()[0] if command[0] else "?").name
    if program.startswith("python") and "-m" in command[:-1]:
        return command[command.index("-m") + 1]
    return program
