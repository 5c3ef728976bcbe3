"""What is loaded, in which type, and what is refused before it can answer wrongly."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from common.failures import Failure
from common.models.store import ModelStore
from common.models.tokenizer import Tokenizer
from common.settings import WorkerSettings
from tests.support.engines import CPU, request, run_one, tiny_engine
from tests.support.native_kernels import are_runnable
from tests.support.tiny_model import MAX_POSITIONS
from workers.engine.factory import build_engine
from workers.model.kv_cache import LayerShape
from workers.model.loader import (
    check_attention,
    inspect_layers,
    load_model,
    position_limit,
    select_device,
    select_dtype,
)


@pytest.fixture(scope="module")
def data_dir(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds the tiny model."""
    data_dir = tmp_path_factory.mktemp("data")
    ModelStore(data_dir).add(str(tiny_model), "tiny")
    return data_dir


def test_an_engine_is_built_from_the_store(data_dir: Path, tiny_model: Path) -> None:
    engine = build_engine(WorkerSettings(data_dir=data_dir, model="tiny", dtype="float32"))
    assert engine.model_version == ModelStore(data_dir).get("tiny").manifest.version
    assert engine.max_cost == MAX_POSITIONS
    load = engine.load()
    assert (load.free_slots, load.free_tokens) == (32, 65_536)
    prompt = Tokenizer.load(tiny_model).encode("The")
    expected = run_one(tiny_engine(tiny_model), request("g", prompt))
    assert run_one(engine, request("g", prompt)).tokens == expected.tokens


def test_quantized_weights_are_another_version(data_dir: Path) -> None:
    """Their answers differ, so neither kind of worker goes on with what the other began."""
    values: dict[str, Any] = {"data_dir": data_dir, "model": "tiny", "quantize": "int8"}
    if not are_runnable():
        with pytest.raises(Failure, match="native kernels are off"):
            build_engine(WorkerSettings(**values))
        return
    engine = build_engine(WorkerSettings(dtype="bfloat16", **values))
    assert engine.model_version == ModelStore(data_dir).get("tiny").manifest.version + "+int8"


def test_only_a_processor_quantizes(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    settings = WorkerSettings(data_dir=data_dir, model="tiny", quantize="int8")
    with pytest.raises(Failure, match="quantize=int8 is for processors; the device is cuda"):
        build_engine(settings)


def test_the_smallest_limit_holds(data_dir: Path) -> None:
    """Of the model, of the setting for one request, and of the whole cache."""
    values: dict[str, Any] = {"data_dir": data_dir, "model": "tiny", "dtype": "float32"}
    assert build_engine(WorkerSettings(max_total_tokens=100, **values)).max_cost == 100
    assert build_engine(WorkerSettings(max_batch_total_tokens=80, **values)).max_cost == 80


def test_changed_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    store.add(str(tiny_model), "tiny")
    weights = store.get("tiny").path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(Failure) as caught:
        build_engine(WorkerSettings(data_dir=tmp_path, model="tiny"))
    assert caught.value.code == "WEIGHTS_MISMATCH"


@pytest.fixture
def damaged(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "damaged"))


def test_a_file_that_holds_no_tensors_is_refused(damaged: Path) -> None:
    (damaged / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(Failure, match="damaged") as caught:
        load_model(damaged, dtype=torch.float32, device=CPU)
    assert caught.value.code == "MODEL_LOAD_FAILED"


def test_a_tensor_that_is_missing_is_named(damaged: Path) -> None:
    """transformers would put random numbers in its place and go on."""
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(damaged / "model.safetensors")
    del tensors[name]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(Failure, match=name) as caught:
        load_model(damaged, dtype=torch.float32, device=CPU)
    assert caught.value.code == "MODEL_LOAD_FAILED"


def test_layers_are_seen_as_they_are(tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype=torch.float32, device=CPU)
    assert inspect_layers(model) == {0: LayerShape(2, 16, 16), 1: LayerShape(2, 16, 16)}


def test_the_check_sees_a_wrong_attention(tiny_model: Path) -> None:
    """Told that a layer keeps less than it does, ours differs, and the start fails."""
    model = load_model(tiny_model, dtype=torch.float32, device=CPU)
    layers = inspect_layers(model)
    check_attention(model, layers)
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(Failure, match="off by"):
        check_attention(model, layers)


def test_bfloat16_passes_the_check(tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype=torch.bfloat16, device=CPU)
    check_attention(model, inspect_layers(model))


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
        ({"architecture": "aarch64"}, torch.float32),
    ],
)
def test_auto_is_bfloat16_only_in_hardware(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, object], expected: torch.dtype
) -> None:
    """Emulated, it is slower than float32 and less exact."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert select_dtype("auto", CPU) == expected
    assert select_dtype("float32", CPU) == torch.float32


def test_a_type_that_the_device_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated it would run for hours, and look like a stall."""
    with pytest.raises(Failure, match="float16 is for CUDA"):
        select_dtype("float16", CPU)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(Failure, match="no bfloat16"):
        select_dtype("bfloat16", cuda)
    assert select_dtype("auto", cuda) == torch.float32
    assert select_dtype("float16", cuda) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert select_dtype("auto", cuda) == select_dtype("bfloat16", cuda) == torch.bfloat16


@pytest.mark.parametrize("name", ["cuda", "abacus"])
def test_a_device_that_is_not_there_is_one_clear_failure(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == CPU
    with pytest.raises(Failure, match=name) as caught:
        select_device(name)
    assert caught.value.code == "MODEL_LOAD_FAILED"


def test_rotary_embeddings_that_change_with_length_limit_it() -> None:
    """Beyond the trained length one long sequence would change its neighbours' positions."""
    plain = LlamaConfig(max_position_embeddings=4096)
    assert position_limit(plain) == 4096
    plain.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 1024,
    }
    assert position_limit(plain) == 1024
