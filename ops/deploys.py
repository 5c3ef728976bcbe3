"""What changed since the last start of a data directory: versions, commit, model and settings.

Told as ``deploy.*`` and ``config.changed``, so that "what changed?" can be answered from the log
alone. What is compared with is the last start whose processes all came up.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from pydantic import SecretStr
from pydantic_settings import BaseSettings

from common import build
from common.logs import get_logger
from common.models.store import ModelStore
from ops.probe import without_password
from ops.runfile import run_dir

log = get_logger()

_MASKED = "(masked) "
_MASK = "(masked)"


class Record(msgspec.Struct, frozen=True):
    """A start that came up. ``before`` are the versions that it replaced."""

    versions: dict[str, str]
    settings: dict[str, Any]
    before: dict[str, str] = {}


class Deploys:
    """Of one data directory and one start: :meth:`tell_started`, then :meth:`tell_promoted`."""

    def __init__(self, data_dir: Path, versions: Mapping[str, str], *given: BaseSettings) -> None:
        """``given`` are all settings that count; of two of one name the last one does."""
        self._path = run_dir(data_dir) / "last.json"
        self._versions = dict(versions)
        self._settings = {name: value for one in given for name, value in _values(one).items()}
        self._last = self._read()

    def _read(self) -> Record | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Record)
        except (OSError, msgspec.MsgspecError):
            return None

    def _changed(self) -> list[dict[str, str]]:
        last = self._last.versions if self._last else self._versions
        return [
            {"what": what, "from_version": last.get(what, ""), "to_version": version}
            for what, version in self._versions.items()
            if last.get(what, "") != version
        ]

    def tell_started(self) -> None:
        """What is another one than at the last start."""
        for change in self._changed():
            log.info("deploy.started", **change)
        last = self._last.settings if self._last else self._settings
        names = sorted(last.keys() | self._settings.keys())
        diff = {
            name: [_shown(last.get(name)), _shown(self._settings.get(name))]
            for name in names
            if last.get(name) != self._settings.get(name)
        }
        if diff:
            log.info("config.changed", diff=diff)

    def tell_promoted(self) -> None:
        """All of it came up: from now on it is what the next start is compared with."""
        before = dict(self._last.before) if self._last else {}
        for change in self._changed():
            what, version = change["what"], change["to_version"]
            if before.get(what) == version:
                log.warning("deploy.rolled_back", **change)
            else:
                log.info("deploy.promoted", **change)
            before[what] = change["from_version"]
        record = Record(self._versions, self._settings, before)
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
        fresh.replace(self._path)


def versions_of(data_dir: Path, model: str) -> dict[str, str]:
    """What runs, by what can change of it. Raises: Failure MODEL_NOT_FOUND, MODEL_LOAD_FAILED."""
    return {
        "version": build.version(),
        "git_sha": build.git_sha(),
        "model_version": ModelStore(data_dir).get(model).manifest.version,
    }


def _values(settings: BaseSettings) -> dict[str, Any]:
    """As JSON; of a secret what tells it from another one, of a URL all but its password."""
    values: dict[str, Any] = settings.model_dump(mode="json")
    for name, value in settings:
        if isinstance(value, SecretStr):
            secret = value.get_secret_value()
            values[name] = secret and _MASKED + hashlib.sha256(secret.encode()).hexdigest()
        elif name.endswith("_url"):
            values[name] = without_password(str(value))
    return values


def _shown(value: Any) -> Any:
    return _MASK if isinstance(value, str) and value.startswith(_MASKED) else value
