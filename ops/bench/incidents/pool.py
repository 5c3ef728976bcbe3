"""`headrace up` whose workers take orders: each has a file that says how it is to misbehave.

Run as ``python -m ops.bench.incidents.pool`` with the options of `headrace up`.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ops.bench.incidents.worker import ORDERS
from ops.options import build, options_of
from ops.processes import Processes, UpSettings
from ops.supervisor import ProcessSpec
from ops.up import up


def orders_path(data_dir: Path, process: str) -> Path:
    """Of the worker in the slot ``process``, such as ``worker 1``."""
    return data_dir / "orders" / f"{process.replace(' ', '-')}.json"


class MisledProcesses(Processes):
    def specs(self) -> list[ProcessSpec]:
        return [self._misled(spec) if spec.role == "worker" else spec for spec in super().specs()]

    def _misled(self, spec: ProcessSpec) -> ProcessSpec:
        return replace(
            spec,
            argv=[sys.executable, "-P", "-m", "ops.bench.incidents.worker"],
            env={**spec.env, ORDERS: str(orders_path(self.data_dir, spec.name))},
        )


@click.command()
@options_of(UpSettings)
def main(**given: Any) -> None:
    up(build(UpSettings, given), MisledProcesses)


if __name__ == "__main__":
    main()
