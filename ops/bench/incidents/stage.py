"""A running Headrace and the levers to break it with: what a fault of the catalogue may do."""

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import click
import msgspec

from common import keys
from common.broker import Broker
from common.keys import ApiKey, Limits
from common.models.simulated import SIMULATED_MODEL
from common.settings import KeySettings
from ops import runfile
from ops.bench.incidents.places import find_process
from ops.bench.incidents.pool import orders_path
from ops.bench.incidents.traffic import Plan, Source
from ops.bench.incidents.worker import Orders
from ops.bench.instance import instance_in
from ops.keys import with_broker
from ops.runfile import ProcessState
from ops.supervisor import State

TENANTS = ("alder", "birch", "cedar", "elm", "fir")
_PATIENCE_S = 60.0
_LOOK_S = 0.05
_POOL = ("ops.bench.incidents.pool",)


class Stage:
    """One instance in ``data_dir``, and who calls it. ``chance`` decides what the seed decides."""

    def __init__(
        self, data_dir: Path, seed: int, *, workers: int, gateways: int, lead_s: float
    ) -> None:
        self.data_dir = data_dir
        self.seed = seed
        self.lead_s = lead_s
        """When the fault begins, from the clients' first second on."""
        self.chance = random.Random(seed)
        self.onset = 0.0
        """When the fault began, in seconds since 1970; a fault that takes a while corrects it."""
        self.num_workers = workers
        self.num_gateways = gateways
        self.keys: dict[str, str] = {}
        """Of each tenant."""
        self.env: dict[str, str] = {}
        self._running = ExitStack()

    def __enter__(self) -> Self:
        (self.data_dir / "orders").mkdir(exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- the instance

    def start(self, env: Mapping[str, object] | None = None) -> None:
        """``env`` are settings without their prefix; they stay for later starts."""
        self.env |= {f"HEADRACE_{name}": str(value) for name, value in (env or {}).items()}
        options = ["--engine", "simulated", "--workers", str(self.num_workers)]
        options += ["--gateways", str(self.num_gateways)]
        self._running.enter_context(
            instance_in(self.data_dir, *options, env=self.env, program=_POOL)
        )

    def stop(self) -> None:
        self._running.close()

    def restart(self, env: Mapping[str, object] | None = None) -> None:
        """As after a change of the configuration: all of it, with logs and data kept."""
        self.stop()
        self.start(env)

    # --- who is there

    def process(self, name: str) -> ProcessState:
        """Raises: click.ClickException when there is no such process."""
        found = find_process(self.data_dir, name)
        if found is None:
            raise click.ClickException(f"the run has no process {name!r}")
        return found

    def instance(self, name: str) -> str:
        return self.process(name).instance

    def any_worker(self) -> str:
        return f"worker {self.chance.randint(1, self.num_workers)}"

    def any_gateway(self) -> str:
        return f"gateway {self.chance.randint(1, self.num_gateways)}"

    # --- levers

    def order(self, process: str, orders: Orders) -> None:
        """Tell a worker how to misbehave from its next step on."""
        path = orders_path(self.data_dir, process)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(orders))
        fresh.replace(path)

    def send(self, process: str, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process(process).pid, number)

    def stall(self, process: str, seconds: float) -> None:
        """SIGSTOP for a while."""
        self.send(process, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            self.send(process, signal.SIGCONT)

    def replace(self, processes: Sequence[str], orders: Orders) -> None:
        """Stop workers in order; others, under ``orders``, take their places. The fault begins
        with the first of these.
        """
        before = {name: self.instance(name) for name in processes}
        for name in processes:
            self.order(name, orders)
            self.send(name, signal.SIGTERM)
        for name in processes:
            self.until_ready(name, lambda it: it.instance not in ("", before[it.name]))
            if name == processes[0]:
                self.onset = time.time()

    def until_ready(self, process: str, also: Callable[[ProcessState], bool]) -> None:
        give_up_at = time.monotonic() + _PATIENCE_S
        while True:
            found = self.process(process)
            if found.state == State.READY and also(found):
                return
            if time.monotonic() > give_up_at:
                raise click.ClickException(f"{process} did not come back")
            time.sleep(_LOOK_S)

    def tell_server(self, *words: str) -> str:
        """Send a command to Redis; returns the first line of its answer."""
        state = runfile.read_state(self.data_dir)
        if state is None:
            raise click.ClickException("the run has no server")
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(10.0)
            link.connect(urlsplit(state.redis_url).path)
            link.sendall(" ".join(words).encode() + b"\r\n")
            return link.recv(4096).split(b"\r\n")[0].decode(errors="replace")

    @contextmanager
    def full_disk_for(self, process: str) -> Generator[None]:
        """While this lasts, the process can write no file, as on a disk that is full."""
        pid = self.process(process).pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    # --- who calls

    def settings(self) -> KeySettings:
        return KeySettings(data_dir=self.data_dir, model=SIMULATED_MODEL)

    def make_keys(self, limits: Mapping[str, Limits] | None = None) -> None:
        """One for each tenant, that of a tenant in ``limits`` with those."""
        pepper = keys.make_pepper(self.data_dir)
        made: list[ApiKey] = []
        for tenant in TENANTS:
            key_id = keys.new_key_id()
            text = self.keys[tenant] = keys.new_key_text(key_id)
            made.append(
                ApiKey(
                    id=key_id,
                    tenant=tenant,
                    hash=keys.hashed(pepper, text),
                    created_s=int(time.time()),
                    scopes=("generate", "batch"),
                    limits=(limits or {}).get(tenant, Limits()),
                )
            )

        async def add(broker: Broker) -> None:
            for key in made:
                await broker.key_store.add(key, keys.fingerprint(pepper))

        with_broker(self.settings(), add)

    @contextmanager
    def traffic(self, seconds: float, sources: list[Source], seen: Path) -> Generator[float]:
        """Clients for so long; gives the wall time at which they began. Ends with the last one."""
        plan = Plan(str(self.data_dir), self.seed, seconds, sources)
        command = [sys.executable, "-P", "-m", "ops.bench.incidents.traffic", str(seen)]
        with subprocess.Popen(  # noqa: S603 - our own command
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as clients:
            try:
                assert clients.stdin is not None  # noqa: S101 - it was asked for
                assert clients.stdout is not None  # noqa: S101
                clients.stdin.write(msgspec.json.encode(plan) + b"\n")
                clients.stdin.close()
                yield float(clients.stdout.readline() or b"nan")
                clients.wait(seconds + _PATIENCE_S)
            finally:
                clients.kill()
