"""The store of models: one directory per model, each with its manifest, added whole or not at all.

A model is built in a hidden folder of the store and renamed into place. Adds of the same name wait
for one another. What is stored is never changed in place: engines map the weights from here.
"""

import fcntl
import re
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.failures import Failure
from common.models.files import check_directory, sync
from common.models.manifest import (
    MANIFEST_FILE,
    Manifest,
    Provenance,
    describe,
    hash_file,
    model_version,
    read_manifest,
    write_manifest,
)
from common.models.simulated import SIMULATED_MODEL
from common.models.sources import BUILT_IN, DEFAULT_MODEL, Progress, Source, find_source

__all__ = ["DEFAULT_MODEL", "SIMULATED_MODEL", "ModelStore", "StoredModel"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_LOCK_TIMEOUT_S = 3600.0
"""Longest wait for another process that adds the same model: a download may take that long."""
_LOCK_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A complete model in the store."""

    path: Path
    manifest: Manifest

    def verify(self) -> None:
        """Hash every file again, at about a gigabyte per second.

        Raises:
            Failure: WEIGHTS_MISMATCH, naming the first file that differs, is missing or is extra.
        """
        extra = {path.name for path in self.path.iterdir()} - self.manifest.files.keys()
        for name in sorted(extra - {MANIFEST_FILE}):
            raise Failure("WEIGHTS_MISMATCH", f"{self.path / name} is not in the manifest")
        for name, entry in self.manifest.files.items():
            path = self.path / name
            try:
                found = hash_file(path)
            except OSError as error:
                raise Failure("WEIGHTS_MISMATCH", f"{path} cannot be read: {error}") from error
            if found != entry:
                raise Failure("WEIGHTS_MISMATCH", f"{path} differs from the manifest")
        if model_version(self.manifest.name, self.manifest.files) != self.manifest.version:
            raise Failure("WEIGHTS_MISMATCH", f"{self.path} is not {self.manifest.version}")


class ModelStore:
    """The models below ``<data_dir>/models``; any number of processes may use one store."""

    def __init__(self, data_dir: Path, *, hub_endpoint: str | None = None) -> None:
        """``hub_endpoint`` replaces the Hugging Face hub's address (or set ``HF_ENDPOINT``)."""
        self._root = data_dir / "models"
        self._hub_endpoint = hub_endpoint

    def add(
        self,
        source: str,
        name: str | None = None,
        on_progress: Progress | None = None,
        *,
        force: bool = False,
    ) -> Manifest:
        """Fetch a model, check it and keep it; blocks until done.

        ``source`` is a hub id (``org/name`` or ``org/name@revision``), a directory of safetensors,
        a GGUF file, ``SmolLM2-135M-Instruct`` (the default model) or ``simulated``. A model that
        is already here under that name is left alone; ``force`` fetches and replaces it.
        ``on_progress(what, done, total)`` may be called from another thread; total 0 is unknown.

        Raises:
            Failure: UNSAFE_FORMAT, BAD_REQUEST (a bad name or source; other content under the
                same name), MODEL_LOAD_FAILED. The message names the file.
        """
        report = on_progress or _report_nothing
        origin = find_source(source, hub_endpoint=self._hub_endpoint)
        name = _checked_name(name or origin.default_name)
        if name == SIMULATED_MODEL and source != SIMULATED_MODEL:
            raise Failure("BAD_REQUEST", f"The name {name} is taken by Headrace.", field="name")
        try:
            present = None if force else self._present(name)
            if present is not None and origin.is_already(present):
                return present
            with self._locked(name, report):
                return self._add(origin, name, report, force=force)
        except OSError as error:
            raise Failure("MODEL_LOAD_FAILED", f"{name} cannot be stored: {error}") from error

    def add_simulated(self) -> Manifest:
        """The model without weights that the simulated engine and its gateways use."""
        return self.add(SIMULATED_MODEL)

    def get(self, name: str) -> StoredModel:
        """A model by its name. Sizes are checked here, hashes by :meth:`StoredModel.verify`.

        Raises:
            Failure: MODEL_NOT_FOUND; MODEL_LOAD_FAILED, if what lies there is damaged.
        """
        path = self._root / name
        if not _NAME.fullmatch(name) or not (path / MANIFEST_FILE).exists():
            raise Failure(
                "MODEL_NOT_FOUND", f"There is no model {name!r} here (see: headrace model list)."
            )
        manifest = read_manifest(path)
        if manifest.name != name:
            raise Failure("MODEL_LOAD_FAILED", f"{path} holds the manifest of {manifest.name!r}")
        for file, entry in manifest.files.items():
            if not (path / file).is_file() or (path / file).stat().st_size != entry.bytes:
                raise Failure("MODEL_LOAD_FAILED", f"{path / file} is missing or cut off")
        return StoredModel(path, manifest)

    def list(self) -> list[Manifest]:
        """All models that :meth:`get` would give, by name."""
        names = sorted(path.name for path in self._root.iterdir()) if self._root.is_dir() else []
        return [manifest for name in names if (manifest := self._present(name)) is not None]

    def _add(self, origin: Source, name: str, report: Progress, *, force: bool) -> Manifest:
        """The part of :meth:`add` that happens under the lock."""
        present = self._present(name)
        if present is not None and not force and origin.is_already(present):
            return present
        with self._staging(name) as (staged, work):
            provenance = origin.fetch(staged, work, report)
            report(f"checking {name}", 0, 0)
            manifest = _complete(staged, name, provenance)
            if present is not None and present.version == manifest.version:
                return present
            if present is not None and not force and present.source != BUILT_IN:
                raise Failure(
                    "BAD_REQUEST",
                    f"{name} is already stored with other content ({present.version}; this would"
                    f" be {manifest.version}). Give the new one another name, or replace the old"
                    " one with --force.",
                    field="name",
                )
            self._publish(staged, name)
            return manifest

    def _present(self, name: str) -> Manifest | None:
        try:
            return self.get(name).manifest
        except Failure:
            return None

    @contextmanager
    def _locked(self, name: str, report: Progress) -> Generator[None]:
        """Only one add of a name at a time; the lock falls with its process, however that ends."""
        folder = self._root / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        with (folder / name).open("w") as file:
            while not _try_lock(file.fileno()):
                report(f"waiting for another process that adds {name}", 0, 0)
                if time.monotonic() > deadline:
                    raise Failure("MODEL_LOAD_FAILED", f"Another process is still adding {name}.")
                time.sleep(_LOCK_POLL_S)
            yield

    @contextmanager
    def _staging(self, name: str) -> Generator[tuple[Path, Path]]:
        """A folder to build in, always empty, and one for downloads, kept until they are used."""
        staged = self._root / ".staging" / name
        work = self._root / ".downloads" / name
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        work.mkdir(parents=True, exist_ok=True)
        try:
            yield staged, work
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)

    def _publish(self, staged: Path, name: str) -> None:
        """Put the complete model into its place, and an old one of that name out of it."""
        target = self._root / name
        if target.exists():
            old = self._root / ".staging" / f"{name}.old"
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            staged.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            staged.rename(target)
        sync(self._root)


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise Failure(
            "BAD_REQUEST",
            f"{name!r} cannot name a model: letters, digits, '.', '_' and '-', at most 96 of them,"
            " and a letter or digit first.",
            field="name",
        )
    return name


def _complete(staged: Path, name: str, provenance: Provenance) -> Manifest:
    """Check what a source has made, bring it to the disk and write its manifest."""
    simulated = provenance.source == BUILT_IN
    files = check_directory(staged, weights_required=not simulated)
    manifest = describe(staged, name, provenance, files)
    for path in files:
        path.chmod(0o644)  # a gateway may run as another user than who added the model
        sync(path)
    write_manifest(staged, manifest)
    return manifest


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _report_nothing(what: str, done: int, total: int) -> None:
    """Progress for nobody."""
