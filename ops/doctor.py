"""`headrace doctor`: what would keep Headrace from working well here, and what mends it.

Each finding has an exit code of its own; with several it is that of the first, which is the one to
mend first.
"""

import asyncio
import math
import secrets
import shutil
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec
from structlog.testing import capture_logs

from common import keys
from common.broker import Broker, ServerFacts, connect
from common.failures import Failure
from common.models.store import ModelStore
from common.storage import open_storage
from common.storage.local import LocalStorage
from ops import runfile
from ops.probe import Unreachable, free_ports, without_password
from ops.processes import DoctorSettings

OLDEST_SERVER = (7, 0)
"""Function libraries came with Redis 7.0; every Valkey has them."""
REDIS_FIXED: dict[tuple[int, ...], tuple[int, ...]] = {
    (7, 2): (7, 2, 16),
    (7, 4): (7, 4, 11),
    (8, 2): (8, 2, 9),
    (8, 4): (8, 4, 6),
    (8, 6): (8, 6, 6),
    (8, 8): (8, 8, 2),
    (8, 10): (8, 10, 1),
}
"""By line, the first release without the gravest holes known in November 2026: without a key, over
TLS (CVE-2026-81934; its record lists these), and, from clients that may wait, as ours do
(CVE-2026-23479, fixed in May)."""
VALKEY_FIXED: dict[tuple[int, ...], tuple[int, ...]] = {
    (8, 0): (8, 0, 11),
    (8, 1): (8, 1, 9),
    (9, 0): (9, 0, 5),
    (9, 1): (9, 1, 1),
}
"""The same by its release notes: CVE-2026-56684 (TLS), CVE-2026-63639 (streams), and the latter."""
MAX_CLOCK_OFFSET_S = 1.0
"""Keys expire by a gateway's clock, and its figures compare both."""
MIN_FREE_BYTES = 2 * 1024**3
_ANSWER_LIMIT_S = 5.0
_STORAGE_LIMIT_S = 10.0
_MEND_STORAGE = (
    "a --storage-url that this user may write to; for s3:// with AWS_ACCESS_KEY_ID, "
    "AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL in the environment"
)

EXIT_CODES = {
    "redis": 10,
    "version": 11,
    "functions": 12,
    "eviction": 13,
    "persistence": 14,
    "durability": 20,
    "clock": 15,
    "keys": 16,
    "model": 17,
    "disk": 18,
    "storage": 22,
    "port": 19,
    "holes": 21,
}
"""By check, in the order in which they are worth mending."""
_ORDER = {check: place for place, check in enumerate(EXIT_CODES)}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check saw; ``mend`` is what helps, empty where all is well."""

    check: str
    words: str
    mend: str = ""


def doctor(
    settings: DoctorSettings, *, as_json: bool, loads: bool, accepted: Collection[str] = ()
) -> int:
    """Print all findings; returns the exit code of the first one that needs mending, else 0.

    Those of the checks ``accepted`` are shown and do not count.
    """
    findings = asyncio.run(examine(settings, loads=loads))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(findings), indent=2))
    else:
        for finding in findings:
            click.echo(f"{finding.check:12} {finding.words}")
            if finding.mend:
                click.echo(f"{'':12} mend it: {finding.mend}")
    counting = (it for it in findings if it.mend and it.check not in accepted)
    return next((EXIT_CODES[finding.check] for finding in counting), 0)


async def examine(settings: DoctorSettings, *, loads: bool = False) -> list[Finding]:
    """Every check's finding, in their order; those of Redis end where it does not answer."""
    findings = [finding async for finding in _of_redis(settings, loads=loads)]
    findings += [_of_model(settings), _of_disk(settings.data_dir), _of_port(settings)]
    findings.append(await _of_storage(settings))
    return sorted(findings, key=lambda finding: _ORDER[finding.check])


async def _of_redis(settings: DoctorSettings, *, loads: bool) -> AsyncIterator[Finding]:
    redis_url = runfile.redis_url_of(settings)
    broker = Broker(connect(redis_url), settings.model, durable_replicas=settings.durable_replicas)
    try:
        async with asyncio.timeout(_ANSWER_LIMIT_S):
            facts = await broker.facts()
            yield Finding("redis", f"{facts.name} {facts.version} at {without_password(redis_url)}")
            version = _version(facts)
            yield version
            if version.mend:
                return
            yield await _functions(broker, loads=loads)
            yield _eviction(facts)
            yield _persistence(facts)
            yield await _durability(broker, facts)
            yield _clock(facts)
            yield _holes(facts)
            yield await _keys(broker, settings)
    except (Failure, TimeoutError) as error:
        said = error.message if isinstance(error, Failure) else "no answer"
        yield Finding(
            "redis",
            f"{without_password(redis_url)}: {said}",
            "headrace up, which brings a server along, or the right --redis-url",
        )
    finally:
        await broker.close()


def _version(facts: ServerFacts) -> Finding:
    if facts.is_valkey or facts.version_numbers >= OLDEST_SERVER:
        return Finding("version", "new enough")
    return Finding(
        "version",
        f"Redis {facts.version} has no functions",
        "install Redis 7.0 or newer, or Valkey",
    )


def _holes(facts: ServerFacts) -> Finding:
    """By version alone: distributions mend older ones without raising it."""
    fixed = VALKEY_FIXED if facts.is_valkey else REDIS_FIXED
    version = facts.version_numbers
    line = version[:2]
    if line > max(fixed) or version >= fixed.get(line, (math.inf,)):
        return Finding("holes", "none is known that was mended since")
    later = [".".join(map(str, release)) for release in fixed.values() if release > version]
    return Finding(
        "holes",
        f"{facts.name} {facts.version} has security holes that later releases mended, unless your "
        "distribution did (then: --accept holes)",
        f"install {facts.name} {', '.join(later)} or newer",
    )


async def _functions(broker: Broker, *, loads: bool) -> Finding:
    if loads:
        await broker.load()
    if await broker.is_loaded():
        return Finding("functions", "this version's are loaded")
    return Finding(
        "functions", "this version's are not loaded", "headrace doctor --load --redis-url URL"
    )


def _eviction(facts: ServerFacts) -> Finding:
    if facts.eviction == "noeviction":
        return Finding("eviction", "nothing is evicted")
    return Finding(
        "eviction",
        f"maxmemory-policy is {facts.eviction}: a full Redis would lose prompts in silence",
        "redis-cli config set maxmemory-policy noeviction (and in redis.conf)",
    )


def _persistence(facts: ServerFacts) -> Finding:
    if facts.has_append_only_file:
        return Finding("persistence", "an append-only file is kept")
    return Finding(
        "persistence",
        "no append-only file: a restart of Redis loses queue, streams and API keys",
        "redis-cli config set appendonly yes (and in redis.conf)",
    )


async def _durability(broker: Broker, facts: ServerFacts) -> Finding:
    """Whether what is promised for later (batches, files, background) survives a crash of Redis."""
    gap = await broker.durability_gap()
    if not gap:
        return Finding("durability", "what is promised for later waits for the disk")
    if facts.has_append_only_file and facts.fsync == "always":
        return Finding("durability", "every command is on disk before it is answered")
    return Finding(
        "durability",
        f"{gap}; what was promised in its last second may be lost",
        "Redis 7.2 or newer, or Valkey, with appendfsync everysec; else appendfsync always",
    )


def _clock(facts: ServerFacts) -> Finding:
    if abs(facts.clock_offset_s) <= MAX_CLOCK_OFFSET_S:
        return Finding("clock", f"{facts.clock_offset_s:+.3f} s from this machine's")
    return Finding(
        "clock",
        f"Redis' clock is {facts.clock_offset_s:+.1f} s from this machine's",
        "timedatectl set-ntp true, on both",
    )


async def _keys(broker: Broker, settings: DoctorSettings) -> Finding:
    """Whether this machine could check API keys, if there are any."""
    if not await broker.key_store.has_any():
        return Finding("keys", "there are none; gateways on loopback ask for none")
    try:
        pepper = keys.read_pepper(settings.key_pepper.get_secret_value(), settings.data_dir)
        if pepper is None:
            raise keys.no_pepper(settings.data_dir)
        await broker.key_store.check_pepper(keys.fingerprint(pepper))
    except Failure as failure:
        if failure.code != "ACCESS_MISCONFIGURED":
            raise
        return Finding("keys", failure.message, "set HEADRACE_KEY_PEPPER, or copy keys.pepper")
    return Finding("keys", "there are some, and their pepper is here")


def _of_model(settings: DoctorSettings) -> Finding:
    try:
        manifest = ModelStore(settings.data_dir).get(settings.model).manifest
    except Failure as failure:
        return Finding(
            "model", failure.message, f"headrace model add SOURCE --data-dir {settings.data_dir}"
        )
    return Finding("model", manifest.version)


def _of_disk(data_dir: Path) -> Finding:
    place = data_dir.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    words = f"{free / 1024**3:.1f} GiB are free at {place}"
    if free >= MIN_FREE_BYTES:
        return Finding("disk", words)
    return Finding("disk", words, f"make room, or name another --data-dir (du -sh {place}/*)")


async def _of_storage(settings: DoctorSettings) -> Finding:
    """Whether a file can be written, and by one of two only: batches rely on both."""
    where = settings.storage_url or f"{settings.data_dir}/files"
    name = f"doctor/{secrets.token_hex(8)}"
    try:
        storage = open_storage(settings.storage_url, settings.data_dir)
        if isinstance(storage, LocalStorage) and not storage.root.exists():
            # By its own user, who may be another one.
            return Finding("storage", f"{where} is made with the first file")
        with capture_logs():  # the finding says it all
            async with asyncio.timeout(_STORAGE_LIMIT_S):
                await storage.put(name, b"", only_if_absent=True)
                is_written_twice = await storage.put(name, b"", only_if_absent=True)
                await storage.delete(name)
        storage.close()
    except (Failure, TimeoutError) as failure:
        cause = str(failure.__cause__ or "no answer").partition("\n")[0]
        return Finding("storage", f"{where}: {cause}"[:300], _MEND_STORAGE)
    if is_written_twice:
        return Finding(
            "storage",
            f"{where} lets two write one object that must be absent: lines of a batch could be "
            "answered twice",
            "a store that knows If-None-Match, as S3, GCS, Azure and newer MinIO do",
        )
    return Finding("storage", f"{where} takes files")


def _of_port(settings: DoctorSettings) -> Finding:
    run = runfile.read_state(settings.data_dir)
    if run is not None:
        return Finding("port", f"`headrace up` runs here (pid {run.pid})")
    try:
        free_ports(settings.host, settings.port, 1)
    except Unreachable as taken:
        return Finding(
            "port", taken.message, f"--port, or see who it is: ss -ltnp sport = :{settings.port}"
        )
    return Finding("port", f"{settings.host}:{settings.port} is free")
