"""The files of a model: which are taken, which are refused, and how they are read without trust.

Nothing here imports a model library: a model is judged before anything that could be fooled by it
has seen it.
"""

import json
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from common.failures import Failure

JsonObject = dict[str, Any]

TOKENIZER_FILE = "tokenizer.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"

CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Keys of ``tokenizer_config.json``; templates know the tokens by these names."""

_WEIGHTS_NAME = re.compile(r"model[A-Za-z0-9._-]{0,100}\.safetensors")

_PICKLES = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".keras"}
)
_CODE = frozenset({".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"})
_REMOTE_CODE_KEYS = frozenset({"auto_map", "custom_pipelines"})

_MAX_ENTRIES = 10_000
"""Files looked at in a directory; a model has dozens."""
_MAX_CONFIG_BYTES = 4 * 1024 * 1024
_MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
"""The largest published tokenizers are near 40 MB."""
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself."""

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
}


def is_wanted(name: str) -> bool:
    """Whether a file of this name is taken from a source; all others are left behind."""
    return (
        name in CONFIG_FILES
        or name in (TOKENIZER_FILE, WEIGHTS_INDEX_FILE)
        or _WEIGHTS_NAME.fullmatch(name) is not None
    )


def refuse_unsafe_name(name: str) -> None:
    """Raises:
    Failure: UNSAFE_FORMAT, if a file of this name holds pickled weights or code.
    """
    suffix = Path(name).suffix.lower()
    if suffix in _PICKLES:
        raise Failure(
            "UNSAFE_FORMAT",
            f"{name} may hold pickles, which run code when loaded; only safetensors are taken",
        )
    if suffix in _CODE:
        raise Failure("UNSAFE_FORMAT", f"{name} is code, and a model's own code is refused")


def check_directory(directory: Path, *, weights_required: bool = True) -> list[Path]:
    """The files of a model in ``directory`` that will be taken, after all of it was looked at.

    Folders inside are looked at too, but nothing is taken from them. Without ``weights_required``
    no weights are taken either: the simulated model has none.

    Raises:
        Failure: UNSAFE_FORMAT for pickles, code, remote code in a configuration and links that lead
            out; MODEL_LOAD_FAILED for what is missing or broken. The message names the file.
    """
    boundary = _boundary(directory)
    for path in _walk(directory):
        refuse_unsafe_name(path.relative_to(directory).as_posix())
        if path.is_symlink() and not path.resolve().is_relative_to(boundary):
            raise Failure("UNSAFE_FORMAT", f"{path} leads out of the model's directory")
    for name in CONFIG_FILES:
        path = directory / name
        if path.suffix == ".json" and path.exists():
            refuse_remote_code(path)
    for name in ("config.json", TOKENIZER_FILE):
        if not (directory / name).is_file():
            raise Failure("MODEL_LOAD_FAILED", f"{directory} has no {name}")
    small = [directory / name for name in (*CONFIG_FILES, TOKENIZER_FILE)]
    weights = _weights(directory) if weights_required else []
    return [path for path in small if path.is_file()] + weights


def refuse_remote_code(path: Path) -> None:
    """Raises:
    Failure: UNSAFE_FORMAT, if a configuration names code to be fetched or run.
    """
    pending: list[object] = [read_json(path)]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            for key in _REMOTE_CODE_KEYS & value.keys():
                raise Failure("UNSAFE_FORMAT", f"{path.name} has {key}: remote code is refused")
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def read_json(path: Path) -> JsonObject:
    """A JSON object from a file of bounded size.

    Raises:
        Failure: MODEL_LOAD_FAILED; the message names the file.
    """
    limit = _MAX_TOKENIZER_BYTES if path.name == TOKENIZER_FILE else _MAX_CONFIG_BYTES
    try:
        if path.stat().st_size > limit:
            raise Failure("MODEL_LOAD_FAILED", f"{path} is larger than {limit} bytes")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Failure("MODEL_LOAD_FAILED", f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise Failure("MODEL_LOAD_FAILED", f"{path} is not a JSON object")
    return value


def to_json(value: JsonObject) -> bytes:
    """Equal values give equal bytes, so that a version is the same wherever it was made."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk before anything else is done."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def token_text(config: JsonObject, key: str) -> str | None:
    """The text of a named token; ``tokenizer_config.json`` holds it bare or as an object."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def weights_dtype(paths: list[Path]) -> str:
    """The dtype that most bytes of the weights have; ``none`` without weights."""
    sizes: Counter[str] = Counter()
    for path in paths:
        for tensor in read_header(path).values():
            sizes[tensor.dtype] += tensor.data_offsets[1] - tensor.data_offsets[0]
    if not sizes:
        return "none"
    largest = sizes.most_common(1)[0][0]
    return _DTYPES.get(largest, largest.lower())


def _walk(directory: Path) -> Iterator[Path]:
    """Every file and link below ``directory``, but for hidden folders (caches of tools)."""
    count = 0
    for folder, folders, names in os.walk(directory, followlinks=False):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*names, *links):
            count += 1
            if count > _MAX_ENTRIES:
                raise Failure("MODEL_LOAD_FAILED", f"{directory} holds too many files")
            yield Path(folder) / name


def _boundary(directory: Path) -> Path:
    """Where links may lead: the directory, or the whole repository of a Hugging Face cache.

    That cache keeps ``snapshots/<commit>/`` full of links into ``blobs/`` beside it.
    """
    resolved = directory.resolve()
    return resolved.parents[1] if resolved.parent.name == "snapshots" else resolved


def _weights(directory: Path) -> list[Path]:
    """The weight files, with their index if there is one; each header is checked."""
    index = directory / WEIGHTS_INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Failure("MODEL_LOAD_FAILED", f"{index} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
    else:
        names = [WEIGHTS_FILE]
    for name in names:
        if not _WEIGHTS_NAME.fullmatch(name):
            raise Failure("UNSAFE_FORMAT", f"{index.name} names {name!r}, which is no weight file")
        if not (directory / name).is_file():
            raise Failure("MODEL_LOAD_FAILED", f"{directory} has no {name}")
    paths = [directory / name for name in names]
    for path in paths:
        read_header(path)
    return [*paths, index] if index.is_file() else paths


class StoredTensor(msgspec.Struct):
    """What a safetensors file says of one of its tensors."""

    dtype: str
    data_offsets: tuple[int, int]
    shape: list[int] = []


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The table of tensors at the start of a safetensors file, by name.

    Raises:
        Failure: MODEL_LOAD_FAILED, if it is not one, or is cut off.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            text = file.read(min(length, _MAX_HEADER_BYTES))
        header = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        tensors = {
            name: msgspec.json.decode(tensor, type=StoredTensor) for name, tensor in header.items()
        }
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise _broken(path, str(error)) from error
    expected = 8 + length + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if expected != size:
        raise _broken(path, f"{expected} bytes expected, {size} found")
    return tensors


def _broken(path: Path, reason: str) -> Failure:
    return Failure("MODEL_LOAD_FAILED", f"{path} is not a complete safetensors file: {reason}")
