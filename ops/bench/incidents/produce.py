"""One run: an instance of its own, its clients, the fault at its moment; then logs and truth."""

import gzip
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import orjson

from ops.bench.incidents import truth
from ops.bench.incidents.catalog import SPEED, Incident, batches_of
from ops.bench.incidents.stage import Stage
from ops.bench.incidents.traffic import Exchange
from ops.bench.incidents.truth import Cause, Truth

LOG = "log"
SEEN = "seen.json"
"""What the clients saw, beside the logs: for whoever wants to know more than the logs say."""
_TELLTALE = b'"fault.injected"'


def produce(incident: Incident, folder: Path) -> Truth:
    """Run ``incident``; leaves the folder ``log`` and the truth in ``folder``.

    Raises: click.ClickException when the instance does not start, or a fault cannot be made.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as data_dir:
        stage = Stage(
            Path(data_dir),
            incident.seed,
            workers=incident.workers,
            gateways=incident.gateways,
            lead_s=incident.lead_s,
        )
        with stage:
            stage.start(SPEED | dict(incident.env))
            stage.make_keys(incident.limits(stage))
            found = _run(incident, stage, folder / SEEN)
        _copy_logs(stage.data_dir / "log", folder / LOG)
        seen = msgspec.json.decode((folder / SEEN).read_bytes(), type=list[Exchange])
        sources = incident.sources(stage)
        asked_by = {
            tenant: {one.request_id for one in seen if sources[one.source].key == key}
            for tenant, key in stage.keys.items()
        }
    resolver = _Resolver(folder / LOG, asked_by)
    causes = [cause for one in found.causes for cause in resolver.resolved(one)]
    told = msgspec.structs.replace(found, causes=causes, requests=len(seen))
    truth.write(folder, told)
    return told


def _run(incident: Incident, stage: Stage, seen: Path) -> Truth:
    """Clients for the whole time, and the fault once they are used to peace."""
    seconds = incident.lead_s + incident.fault_s + incident.tail_s
    batches = batches_of(stage) if incident.batches else nullcontext()
    with batches, stage.traffic(seconds, incident.sources(stage), seen) as began:
        time.sleep(max(0.0, began + incident.lead_s - time.time()))
        stage.onset = time.time()
        causes = incident.act(stage)
        return Truth(
            name=incident.name,
            kind=incident.kind,
            seed=incident.seed,
            symptom=incident.symptom,
            onset=stage.onset if causes else None,
            causes=causes,
            load_average=round(os.getloadavg()[0], 2),
        )


def _copy_logs(log: Path, copy: Path) -> None:
    """All lines but those that would give the fault away."""
    copy.mkdir()
    for path in sorted(log.iterdir()):
        lines = path.read_bytes().splitlines(keepends=True)
        kept = b"".join(line for line in lines if _TELLTALE not in line)
        if kept:
            (copy / path.name).write_bytes(kept)


class _Resolver:
    """Puts into the words of the logs what the catalogue says in its own."""

    def __init__(self, log: Path, asked_by: dict[str, set[str]]) -> None:
        self._lines = list(read_lines(log))
        self._asked_by = asked_by

    def resolved(self, cause: Cause) -> list[Cause]:
        match cause.dimension:
            case "tenant":
                ids = self._asked_by[str(cause.value)]
                return self._all(
                    "tenant_hash", "tenant_hash", lambda it: it.get("client_request_id") in ids
                )
            case "slot":
                pids = {
                    line["child_pid"]
                    for line in self._lines
                    if line.get("name") == cause.value and "child_pid" in line
                }
                return [
                    cause,
                    Cause("worker", cause.value),
                    *self._all("worker", "instance", lambda it: it.get("pid") in pids),
                ]
            case "version_of":
                name = str(cause.value)
                return self._all(
                    "model_version",
                    "model_version",
                    lambda it: it["event"] == "worker.ready" and it["pid"] == self._last_pid(name),
                )
            case "marked":
                dead = {
                    str(line["job_id"]).partition(".")[0]
                    for line in self._lines
                    if line["event"] == "job.dead"
                }
                return [
                    *(Cause("request_id", id) for id in sorted(dead)),
                    *self._all(
                        "prompt_sha256", "prompt_sha256", lambda it: it.get("request_id") in dead
                    ),
                ]
            case _:
                return [cause]

    def _all(self, dimension: str, field: str, is_meant: Any) -> list[Cause]:
        values = {line[field] for line in self._lines if field in line and is_meant(line)}
        return [Cause(dimension, value) for value in sorted(values)]

    def _last_pid(self, process: str) -> int:
        return next(
            line["child_pid"]
            for line in reversed(self._lines)
            if line["event"] in ("process.started", "process.restarted") and line["name"] == process
        )


def read_lines(log: Path) -> Iterable[dict[str, Any]]:
    """The events of a folder; what is no JSON is left out."""
    for path in sorted(log.glob("*.jsonl*")):
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as file:
            for line in file:
                try:
                    event = orjson.loads(line)
                except orjson.JSONDecodeError:
                    continue
                yield event
