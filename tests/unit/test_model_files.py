"""What is refused before anything loads it: pickles, code, remote code, links, and broken files."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from common.failures import Failure
from common.models.files import check_directory, weights_dtype

Tensors = dict[str, tuple[str, int]]


def safetensors(tensors: Tensors, *, header: bytes | None = None) -> bytes:
    """A safetensors file of zeros; each tensor is given by its dtype and its bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, size) in tensors.items():
        table[name] = {"dtype": dtype, "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(table).encode() if header is None else header
    return struct.pack("<Q", len(text)) + text + bytes(end)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with all that a model needs, as far as files go."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(safetensors({"a": ("F32", 8)}))
    return directory


def refusal(directory: Path) -> Failure:
    with pytest.raises(Failure) as caught:
        check_directory(directory)
    return caught.value


def test_only_known_files_are_taken(model: Path) -> None:
    for name in ("README.md", "notes.txt", "consolidated.safetensors", "model-draft.json"):
        (model / name).write_bytes(b"")
    (model / "generation_config.json").write_text("{}")
    (model / ".cache").mkdir()
    (model / ".cache" / "tool.py").write_text("")
    taken = [path.name for path in check_directory(model)]
    assert taken == ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "a.PKL", "a.pickle", "modeling.py", "x.so"],
)
def test_pickles_and_code_are_refused_by_name(model: Path, name: str) -> None:
    """Even beside good weights, and even in a folder below: somebody could load them one day."""
    for place in (Path(name), Path("original") / name):
        (model / place).parent.mkdir(exist_ok=True)
        (model / place).write_bytes(b"")
        failure = refusal(model)
        assert failure.code == "UNSAFE_FORMAT"
        assert str(place) in failure.message
        (model / place).unlink()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content",
    [
        {"auto_map": {"AutoModel": "modeling.Evil"}},
        {"model_type": "llama", "text_config": {"layers": [{"auto_map": {}}]}},
        {"custom_pipelines": {"text-generation": {"impl": "pipeline.Evil"}}},
    ],
)
def test_remote_code_is_refused_wherever_it_is_named(
    model: Path, name: str, content: dict[str, object]
) -> None:
    (model / name).write_text(json.dumps(content))
    failure = refusal(model)
    assert failure.code == "UNSAFE_FORMAT"
    assert name in failure.message


def test_links_may_not_lead_out(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (model / "generation_config.json").symlink_to(tmp_path / "secret")
    failure = refusal(model)
    assert failure.code == "UNSAFE_FORMAT"
    assert "generation_config.json" in failure.message


def test_a_linked_folder_may_not_lead_out_either(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (model / "more").symlink_to(tmp_path / "elsewhere")
    assert refusal(model).code == "UNSAFE_FORMAT"


def test_a_snapshot_of_the_hubs_cache_is_taken(model: Path, tmp_path: Path) -> None:
    """It is made of links into the blobs beside it, which belong to the same repository."""
    repository = tmp_path / "models--acme--tiny"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in model.iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert len(check_directory(snapshot)) == 3


def write_index(model: Path, *names: str) -> None:
    index = {"weight_map": {f"tensor{number}": name for number, name in enumerate(names)}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def test_the_index_says_which_weights_there_are(model: Path) -> None:
    (model / "model-2.safetensors").write_bytes(safetensors({"b": ("BF16", 80)}))
    write_index(model, "model.safetensors", "model-2.safetensors", "model.safetensors")
    names = [path.name for path in check_directory(model)]
    assert names[-3:] == [
        "model-2.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
    ]


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "weights.bin", ""])
def test_an_index_cannot_name_other_places(model: Path, name: str) -> None:
    write_index(model, "model.safetensors", name)
    failure = refusal(model)
    assert failure.code == "UNSAFE_FORMAT"
    assert "index" in failure.message


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda model: (model / "config.json").unlink(), "config.json"),
        (lambda model: (model / "config.json").write_text("[]"), "config.json"),
        (lambda model: (model / "config.json").write_text("{"), "config.json"),
        (lambda model: (model / "config.json").write_text("[" * 100_000), "config.json"),
        (lambda model: (model / "config.json").write_bytes(b" " * 5_000_000), "config.json"),
        (lambda model: (model / "config.json").write_bytes(b"\xff\xfe{}"), "config.json"),
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda model: (model / "model.safetensors").unlink(), "model.safetensors"),
        (write_index, "weight_map"),
        (lambda model: write_index(model, "model-9.safetensors"), "model-9.safetensors"),
        (lambda model: (model / "model.safetensors").write_bytes(b""), "model.safetensors"),
    ],
)
def test_what_is_missing_or_broken_is_named(
    model: Path, damage: Callable[[Path], object], named: str
) -> None:
    damage(model)
    failure = refusal(model)
    assert failure.code == "MODEL_LOAD_FAILED"
    assert named in failure.message


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04.",
        safetensors({"a": ("F32", 8)})[:-1],
        safetensors({"a": ("F32", 8)}) + b"more",
        struct.pack("<Q", 2**63) + b"{}",
        safetensors({}, header=b"[]"),
        safetensors({}, header=b'{"a": 1}'),
        safetensors({}, header=b'{"a": {"dtype": "F32", "data_offsets": [0]}}'),
        safetensors({}, header=b'{"a": {"dtype": "F32", "data_offsets": ["0", "1"]}}'),
    ],
)
def test_weights_that_are_cut_off_or_something_else_are_refused(
    model: Path, content: bytes
) -> None:
    (model / "model.safetensors").write_bytes(content)
    failure = refusal(model)
    assert failure.code == "MODEL_LOAD_FAILED"
    assert "not a complete safetensors file" in failure.message


@pytest.mark.parametrize(
    ("tensors", "dtype"),
    [
        ({"a": ("F32", 8), "b": ("BF16", 80)}, "bfloat16"),
        ({"a": ("F32", 80), "b": ("BF16", 8)}, "float32"),
        ({"a": ("F16", 8)}, "float16"),
        ({"a": ("F99", 8)}, "f99"),
        ({}, "none"),
    ],
)
def test_the_dtype_is_that_of_most_bytes(tmp_path: Path, tensors: Tensors, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(tensors))
    assert weights_dtype([path]) == dtype
