"""LoRA adapters in the store: which are taken, under what version, and which is current.

Adapters of a model lie in ``<data_dir>/adapters/<model>/<name>@<12 hex>/``, one folder per content,
added whole or not at all. ``current.json`` says which content a name stands for. A generation keeps
the version that it began with: an adapter that is replaced stays beside its successor until that is
replaced as well.

The format is that of peft (adapter_config.json and adapter_model.safetensors): Hu et al., LoRA,
arXiv 2106.09685; ``use_rslora``: Kalajdzievski, arXiv 2312.03732.
"""

import fcntl
import math
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from common.failures import Failure
from common.models.files import (
    JsonObject,
    StoredTensor,
    read_header,
    read_json,
    refuse_remote_code,
    refuse_unsafe_name,
    sync,
)
from common.models.manifest import MANIFEST_FILE, FileEntry, Provenance, hash_file, model_version
from common.models.sources import HubSource, Progress

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([A-Za-z0-9][A-Za-z0-9._/-]{0,199}))?", re.ASCII)
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}@[0-9a-f]{12}")
_CURRENT_FILE = "current.json"

_MAX_WEIGHTS_BYTES = 4 * 1024**3
_MAX_TENSORS = 20_000
_MAX_RANK = 512
_MAX_PATTERN_CHARACTERS = 200
"""Keys of ``rank_pattern`` and ``alpha_pattern`` are regular expressions of somebody else's."""

_TENSOR = re.compile(r"base_model\.model\.([\w.]{1,200})\.lora_([AB])\.weight", re.ASCII)
_FLOATS = frozenset({"F32", "F16", "BF16"})

_UNSUPPORTED_KEYS: Mapping[str, str] = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable tokens",
    "lora_bias": "a bias of its own",
    "layer_replication": "layer_replication",
    "target_parameters": "target_parameters",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "arrow_config": "Arrow",
}
"""Keys of a configuration that must be absent or say no, and what they ask for."""

_REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin a training that change the model's own weights too (``init_lora_weights``)."""


class AdapterManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a stored adapter is; written last, so that a folder without it is none.

    ``version`` is ``name@<12 hex>``, made from its files as a model's is. ``scales`` says for each
    module, by its path in the model, by what ``B(A(x))`` is multiplied; ``rank`` is the largest.
    """

    name: str
    version: str
    model: str
    source: str
    revision: str
    licence: str
    rank: int
    scales: dict[str, float]
    files: dict[str, FileEntry]
    created: str

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    @property
    def created_s(self) -> int:
        """Seconds since 1970."""
        return int(datetime.fromisoformat(self.created).timestamp())


class AdapterStore:
    """The adapters of one model. Any number of processes may use one folder."""

    def __init__(self, folder: Path | None = None, model: str = "") -> None:
        """Without ``folder`` there are none. Most callers want :meth:`beside`."""
        self._folder = folder
        self._model = model
        self._seen: tuple[int, int, int] | None = None
        self._manifests: dict[str, AdapterManifest] = {}

    @classmethod
    def beside(cls, data_dir: Path, model: str) -> "AdapterStore":
        """Those of the model ``model`` in the store of ``data_dir``."""
        return cls(data_dir / "adapters" / model, model)

    def list(self) -> list[AdapterManifest]:
        """The current adapters by name; costs one look at a file unless something has changed."""
        return list(self._current().values())

    def resolve(self, name: str) -> AdapterManifest:
        """The current adapter called ``name``, or the one of a current version.

        Raises:
            Failure: ADAPTER_NOT_FOUND.
        """
        found = self._current().get(name.partition("@")[0])
        if found is None or name not in (found.name, found.version):
            raise Failure("ADAPTER_NOT_FOUND", f"There is no adapter {name[:100]!r} here.")
        return found

    def get(self, version: str) -> tuple[Path, AdapterManifest]:
        """The folder and manifest of a version, current or not, with every file hashed again.

        Raises:
            Failure: ADAPTER_NOT_FOUND; ADAPTER_LOAD_FAILED, if what lies there is damaged.
        """
        if self._folder is None or not _VERSION.fullmatch(version):
            raise Failure("ADAPTER_NOT_FOUND", f"There is no adapter {version[:100]!r} here.")
        path = self._folder / version
        if not path.is_dir():
            raise Failure("ADAPTER_NOT_FOUND", f"There is no adapter {version!r} here any more.")
        manifest = _read_manifest(path)
        if manifest.version != version or manifest.files.keys() != {CONFIG_FILE, WEIGHTS_FILE}:
            raise _damaged(version, "its manifest is of something else")
        try:
            files = {name: hash_file(path / name) for name in manifest.files}
        except OSError as error:
            raise _damaged(version, f"{error.filename} cannot be read") from error
        if files != manifest.files or model_version(manifest.name, files) != version:
            raise _damaged(version, "its files differ from its manifest")
        return path, manifest

    def add(
        self,
        source: str,
        name: str,
        on_progress: Progress | None = None,
        *,
        force: bool = False,
        hub_endpoint: str | None = None,
    ) -> AdapterManifest:
        """Check an adapter and keep it; ``force`` replaces another one of that name.

        ``source`` is a directory, or a hub id (``org/name`` or ``org/name@revision``).

        Raises:
            Failure: BAD_REQUEST for a bad name or source, or if the name is taken; UNSAFE_FORMAT
                for pickles and code; ADAPTER_LOAD_FAILED for what is damaged or unsupported;
                MODEL_LOAD_FAILED, if the hub does not give it.
        """
        folder = self._writable()
        if not _NAME.fullmatch(name) or name == self._model:
            raise Failure(
                "BAD_REQUEST",
                f"{name!r} cannot name an adapter: letters, digits, '.', '_' and '-', at most 96 of"
                " them, a letter or digit first, and not the model's own name.",
                field="name",
            )
        report = on_progress or (lambda _what, _done, _total: None)
        staged = folder / f".staging-{name}"
        with _locked(folder / f".lock-{name}"):
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            try:
                provenance = _fetch(source, staged, report, hub_endpoint)
                report(f"checking {name}", 0, 0)
                manifest = _describe(staged, name, self._model, provenance)
                return self._publish(staged, manifest, force=force)
            except OSError as error:
                raise Failure("ADAPTER_LOAD_FAILED", f"{name} cannot be stored: {error}") from error
            finally:
                shutil.rmtree(staged, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Take ``name`` away. What a generation has begun with stays until the name comes again.

        Raises:
            Failure: ADAPTER_NOT_FOUND.
        """
        folder = self._writable()
        self.resolve(name)
        with _locked(folder / f".lock-{_CURRENT_FILE}"):
            versions = _read_current(folder)
            versions.pop(name, None)
            _write_current(folder, versions)

    def _publish(self, staged: Path, manifest: AdapterManifest, *, force: bool) -> AdapterManifest:
        """Put the checked folder into its place and make it current."""
        folder, name = self._writable(), manifest.name
        with _locked(folder / f".lock-{_CURRENT_FILE}"):
            versions = _read_current(folder)
            before = versions.get(name)
            target = folder / manifest.version
            if before == manifest.version and _is_whole(target) and not force:
                return _read_manifest(target)
            if before not in (None, manifest.version) and not force:
                raise Failure(
                    "BAD_REQUEST",
                    f"{name} is already stored with other content ({before}; this would be"
                    f" {manifest.version}). Give the new one another name, or replace the old one"
                    " with --force.",
                    field="name",
                )
            (staged / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
            for path in staged.iterdir():
                path.chmod(0o644)  # a gateway may run as another user than who added it
                sync(path)
            shutil.rmtree(target, ignore_errors=True)
            staged.rename(target)
            _write_current(folder, versions | {name: manifest.version})
            for old in folder.glob(f"{name}@*"):
                if old.name not in (before, manifest.version):
                    shutil.rmtree(old, ignore_errors=True)
        return manifest

    def _current(self) -> dict[str, AdapterManifest]:
        if self._folder is None:
            return {}
        try:
            found = (self._folder / _CURRENT_FILE).stat()
        except FileNotFoundError:
            return {}
        seen = (found.st_mtime_ns, found.st_ino, found.st_size)
        if seen != self._seen:
            versions = sorted(_read_current(self._folder).items())
            self._manifests = {
                name: _read_manifest(self._folder / version)
                for name, version in versions
                if _is_whole(self._folder / version)
            }
            self._seen = seen
        return self._manifests

    def _writable(self) -> Path:
        if self._folder is None:
            raise Failure("BAD_REQUEST", "There is no store of adapters here.")
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder


def check_adapter(folder: Path) -> dict[str, float]:
    """The scale of each adapted module of a peft adapter, after all of it was looked at.

    Raises:
        Failure: UNSAFE_FORMAT; ADAPTER_LOAD_FAILED, with what is missing, broken or unsupported.
    """
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        for path in sorted(folder.glob("adapter_model*")):
            refuse_unsafe_name(path.name)
        raise _unfit(f"{folder} has no {WEIGHTS_FILE}")
    if weights.stat().st_size > _MAX_WEIGHTS_BYTES:
        raise _unfit(f"{WEIGHTS_FILE} is larger than {_MAX_WEIGHTS_BYTES >> 30} GiB")
    try:
        config = read_json(folder / CONFIG_FILE)
        refuse_remote_code(folder / CONFIG_FILE)
        tensors = read_header(weights)
    except Failure as failure:
        if failure.code != "MODEL_LOAD_FAILED":
            raise
        raise _unfit(failure.message) from failure
    _check_config(config)
    return {module: _scale(config, module, rank) for module, rank in _ranks(tensors).items()}


def _check_config(config: JsonObject) -> None:
    if config.get("peft_type") != "LORA":
        raise _unfit(f"peft_type is {config.get('peft_type')!r}; only LORA is supported")
    for key, name in _UNSUPPORTED_KEYS.items():
        if config.get(key):
            raise _unfit(f"{name} is not supported ({key})")
    if config.get("bias", "none") != "none":
        raise _unfit(f"bias is {config['bias']!r}; only none is supported")
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(_REBASING):
        raise _unfit(f"it changes the model's own weights (init_lora_weights: {begun})")


def _ranks(tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Module -> rank, from the shapes of A ``[rank, inputs]`` and B ``[outputs, rank]``."""
    if not 0 < len(tensors) <= _MAX_TENSORS:
        raise _unfit(f"it has {len(tensors)} tensors")
    shapes: dict[str, dict[str, list[int]]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise _unfit(f"tensor {name[:200]!r} is not of a kind that is supported")
        if tensor.dtype not in _FLOATS or len(tensor.shape) != 2 or min(tensor.shape) < 1:
            raise _unfit(f"tensor {name!r} is {tensor.dtype} {tensor.shape}, no matrix of floats")
        shapes.setdefault(match[1], {})[match[2]] = tensor.shape
    ranks: dict[str, int] = {}
    for module, pair in shapes.items():
        if pair.keys() != {"A", "B"} or pair["A"][0] != pair["B"][1]:
            raise _unfit(f"{module} lacks one of A and B, or their ranks differ")
        ranks[module] = pair["A"][0]
    if (rank := max(ranks.values())) > _MAX_RANK:
        raise _unfit(f"its rank is {rank}; at most {_MAX_RANK} is supported")
    return ranks


def _scale(config: JsonObject, module: str, rank: int) -> float:
    """What alpha / r is, or alpha / sqrt(r), with r and alpha as the patterns say.

    Raises:
        Failure: ADAPTER_LOAD_FAILED, if the configuration says another rank than the weights.
    """
    said = _by_pattern(config, "rank_pattern", module, config.get("r"))
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    if said != rank:
        raise _unfit(f"{module} has rank {rank}, and {CONFIG_FILE} says {said!r}")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _unfit(f"lora_alpha of {module} is {alpha!r}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: JsonObject, key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of the module's path matches, as peft does."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise _unfit(f"{key} is no object")
    for pattern, value in patterns.items():
        if len(pattern) > _MAX_PATTERN_CHARACTERS:
            raise _unfit(f"{key} has a key of {len(pattern)} characters")
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise _unfit(f"{key} has the key {pattern!r}: {error}") from error
        if matches:
            return value
    return default


def _fetch(source: str, into: Path, on_progress: Progress, hub_endpoint: str | None) -> Provenance:
    """Copy the two files of an adapter into ``into``, and nothing else."""
    path = Path(source).expanduser()
    if path.is_dir():
        _take(path, into)
        return Provenance(f"directory:{path.resolve()}", "", "unknown")
    refuse_unsafe_name(path.name)
    match = _HUB_ID.fullmatch(source)
    if match is None or path.exists():
        raise Failure(
            "BAD_REQUEST",
            f"{source!r} is no source of an adapter: name a directory, or a hub id (org/name or"
            " org/name@revision).",
            field="source",
        )
    work = into / "download"
    wanted = (CONFIG_FILE, WEIGHTS_FILE)
    hub = HubSource(match[1], match[2], hub_endpoint)
    downloaded, provenance = hub.download(work, on_progress, lambda name: name in wanted)
    _take(downloaded, into)
    shutil.rmtree(work)
    return provenance


def _take(folder: Path, into: Path) -> None:
    check_adapter(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(folder / name, into / name)


def _describe(folder: Path, name: str, model: str, provenance: Provenance) -> AdapterManifest:
    scales = check_adapter(folder)
    files = {file: hash_file(folder / file) for file in (CONFIG_FILE, WEIGHTS_FILE)}
    return AdapterManifest(
        name=name,
        version=model_version(name, files),
        model=model,
        source=provenance.source,
        revision=provenance.revision,
        licence=provenance.licence,
        rank=max(_ranks(read_header(folder / WEIGHTS_FILE)).values()),
        scales=scales,
        files=files,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _read_manifest(path: Path) -> AdapterManifest:
    try:
        return msgspec.json.decode((path / MANIFEST_FILE).read_bytes(), type=AdapterManifest)
    except (OSError, msgspec.DecodeError) as error:
        raise _damaged(path.name, f"its manifest cannot be read: {error}") from error


def _is_whole(path: Path) -> bool:
    try:
        return _read_manifest(path).version == path.name
    except Failure:
        return False


def _read_current(folder: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode((folder / _CURRENT_FILE).read_bytes(), type=dict[str, str])
    except (FileNotFoundError, msgspec.DecodeError):
        return {}


def _write_current(folder: Path, versions: Mapping[str, str]) -> None:
    staged = folder / f".{_CURRENT_FILE}"
    staged.write_bytes(msgspec.json.encode(versions))
    sync(staged)
    staged.replace(folder / _CURRENT_FILE)
    sync(folder)


@contextmanager
def _locked(path: Path) -> Generator[None]:
    """Only one process at a time; the lock falls with its process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        yield


def _unfit(reason: str) -> Failure:
    return Failure("ADAPTER_LOAD_FAILED", f"This adapter is not taken: {reason}.")


def _damaged(version: str, reason: str) -> Failure:
    return Failure("ADAPTER_LOAD_FAILED", f"The adapter {version} is damaged: {reason}.")
