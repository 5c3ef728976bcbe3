"""Where the processes of a run are now: by what its supervisor wrote down."""

from pathlib import Path

from ops import runfile
from ops.runfile import ProcessState


def find_process(data_dir: Path, name: str) -> ProcessState | None:
    """The process in the slot ``name``, such as ``worker 1``."""
    return next((one for one in find_processes(data_dir) if one.name == name), None)


def find_processes(data_dir: Path) -> list[ProcessState]:
    state = runfile.read_state(data_dir)
    return state.processes if state else []


def find_addresses(data_dir: Path) -> list[str]:
    """Of the gateways."""
    return [one.address for one in find_processes(data_dir) if one.role == "gateway"]
