"""A redacted archive of an incident, to send on: lines, report, and a manifest with checksums.

Whoever gets it can ask the same questions, and learns neither who the tenants are, nor how the
machines are called, nor which clients were used. Names are replaced consistently by ones that say
nothing, with a key that is drawn for this bundle and thrown away, so that what belongs together
still does, and two bundles cannot be joined.
"""

import gzip
import hashlib
import hmac
import io
import re
import secrets
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import orjson
from msgspec import structs

from common.clock import wall_ms
from ops.incident.command import (
    Question,
    exit_code,
    open_console,
    output_option,
    question_options,
    warnings_of,
)
from ops.incident.report import write_report
from ops.incident.source import Logs

_REKEYED = {
    "tenant_hash": "",
    "tenant": "",
    "key_id": "",
    "host": "host-",
    "prompt_sha256": "",
    "client_request_id": "",
    "endpoint": "",
    "adapter": "adapter-",
}
"""Fields whose values get another name, and how that begins."""
_REMOVED = frozenset({"user_agent", "data_dir", "socket"})
_FREE_TEXT = frozenset({"message", "error", "reason", "exception", "url", "detail", "address"})
"""Fields that libraries fill: they may hold anything, so they are only told by their length."""
_ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b|\b[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{0,4}){4,7}\b")
_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://\S+")
_PATH = re.compile(r"(?<![\w.])/(?:[\w.+@-]+/)+[\w.+@-]*")
_BLOCK_ROWS = 5_000
_GZIP_LEVEL = 6


@click.command("bundle")
@output_option("incident.tar.gz")
@question_options
def main(*, question: Question, output: Path) -> int:
    """Pack what happened to send it on: without tenants, hosts, clients and free texts.

    Holds the lines as events.jsonl.gz (give it to --logs), the report made of them, and a manifest.
    """
    with question.open() as logs:
        made = write_bundle(logs, question, output)
        console = open_console()
        console.print(*warnings_of(logs), sep="\n", end="")
        console.print(f"{made.lines:,} lines, redacted, written to {output}")
        return exit_code(logs, made.num_findings)


class Made(msgspec.Struct, frozen=True):
    """What is in a bundle, as its manifest.json says."""

    format: int
    made_ms: int
    lines: int
    since: float | None
    until: float | None
    incomplete: list[str]
    malformed: int
    removed: list[str]
    renamed: list[str]
    files: dict[str, str]
    """Name and sha256."""
    num_findings: int


class Redactor:
    """Gives lines other names; the same name always the same one."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._hosts = re.compile(r"(?!)")

    def learn(self, hosts: list[str]) -> None:
        """Host names, which may stand inside of other values, too."""
        known = "|".join(re.escape(host) for host in sorted(hosts, key=len, reverse=True) if host)
        if known:
            self._hosts = re.compile(rf"(?<![\w-])(?:{known})(?![\w-])")

    def line(self, line: dict[str, Any]) -> dict[str, Any]:
        return {
            name: self._value(name, value) for name, value in line.items() if name not in _REMOVED
        }

    def _value(self, name: str, value: Any) -> Any:
        if value is None or value == "":
            return value
        if name in _REKEYED:
            return _REKEYED[name] + self._named(str(value))
        if name in _FREE_TEXT:
            return _kept_of(value)
        return self._inside(value)

    def _inside(self, value: Any) -> Any:
        match value:
            case str():
                return self._plain(value)
            case dict():
                return {key: self._value(key, inner) for key, inner in value.items()
                        if key not in _REMOVED}  # fmt: skip
            case list():
                return [self._inside(inner) for inner in value]
            case _:
                return value

    def _plain(self, text: str) -> str:
        text = _ADDRESS.sub("(address)", _URL.sub("(address)", text))
        text = self._hosts.sub(lambda host: "host-" + self._named(host[0]), text)
        return _PATH.sub("(path)", text)

    def _named(self, value: str) -> str:
        return hmac.new(self._key, value.encode(), hashlib.sha256).hexdigest()[:12]


def _kept_of(value: Any) -> Any:
    """Of an exception its type and fingerprint, of a text its length."""
    if isinstance(value, dict):
        kept = {name: value[name] for name in ("type", "exc_type", "fingerprint") if name in value}
        return kept or "(removed)"
    if isinstance(value, list):
        return [_kept_of(inner) for inner in value]
    return f"({len(str(value))} characters)"


def write_bundle(logs: Logs, question: Question, output: Path) -> Made:
    """Write the archive; what it holds is read again from its own lines, so that nothing leaks."""
    redactor = Redactor(secrets.token_bytes(32))
    hosts = logs.db.execute("SELECT DISTINCT host FROM events WHERE host IS NOT NULL").fetchall()
    redactor.learn([str(row[0]) for row in hosts])
    packed = logs.work.spool().with_suffix(".jsonl.gz")
    num_lines = _write_lines(logs, redactor, packed)
    asked = structs.replace(question, sources=(str(packed),), since=None, until=None)
    with asked.open() as redacted:
        told = structs.replace(asked, sources=("events.jsonl.gz",))
        page, verdict = write_report(redacted, told)
    contents = {"events.jsonl.gz": packed.read_bytes(), "report.html": page.encode()}
    made = Made(
        format=1,
        made_ms=wall_ms(),
        lines=num_lines,
        since=question.since,
        until=question.until,
        incomplete=[redactor.line({"what": each})["what"] for each in logs.incomplete],
        malformed=logs.malformed.count,
        removed=sorted(_REMOVED | _FREE_TEXT),
        renamed=sorted(_REKEYED),
        files={name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        num_findings=len(verdict.findings),
    )
    contents["manifest.json"] = msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n"
    with tarfile.open(output, "w:gz") as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(f"incident/{name}")
            member.size, member.mode, member.mtime = len(data), 0o644, made.made_ms // 1000
            archive.addfile(member, io.BytesIO(data))
    return made


def _write_lines(logs: Logs, redactor: Redactor, path: Path) -> int:
    num_lines = 0
    with gzip.open(path, "wb", compresslevel=_GZIP_LEVEL) as file:
        for line in _lines(logs):
            file.write(orjson.dumps(redactor.line(line)) + b"\n")
            num_lines += 1
    return num_lines


def _lines(logs: Logs) -> Iterator[dict[str, Any]]:
    """In order of time. Lines of crashed interpreters are left out: they quote anything."""
    cursor = logs.db.cursor()
    found = cursor.execute("SELECT fields FROM events WHERE event <> 'process.crashed' ORDER BY t")
    while rows := found.fetchmany(_BLOCK_ROWS):
        for (text,) in rows:
            line = orjson.loads(text)
            if isinstance(line, dict):
                yield line
