"""Adapters in the store: what is taken, what is refused and why, and what a name stands for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.failures import Failure
from common.models.adapters import AdapterStore
from tests.support.adapters import MODULES, write_adapter


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore.beside(tmp_path, "tiny")


def refusal(store: AdapterStore, folder: Path, name: str = "pirate", **options: Any) -> Failure:
    with pytest.raises(Failure) as caught:
        store.add(str(folder), name, **options)
    return caught.value


def test_an_adapter_is_kept_with_its_provenance(store: AdapterStore, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "in", rank=4)
    (folder / "README.md").write_text("not taken")
    manifest = store.add(str(folder), "pirate")
    assert manifest.version.startswith("pirate@")
    assert manifest.source == f"directory:{folder}"
    assert (manifest.model, manifest.rank, manifest.scales.keys()) == ("tiny", 4, MODULES.keys())
    assert set(manifest.scales.values()) == {2.0}
    path, again = store.get(manifest.version)
    assert again == manifest == store.resolve("pirate") == store.resolve(manifest.version)
    assert {file.name for file in path.iterdir()} == {*manifest.files, "manifest.json"}


def test_others_see_what_comes_goes_and_changes(store: AdapterStore, tmp_path: Path) -> None:
    """A gateway holds one of these for its whole life."""
    other = AdapterStore.beside(tmp_path, "tiny")
    assert other.list() == []
    first = store.add(str(write_adapter(tmp_path / "a", seed=1)), "pirate")
    assert other.list() == [first]
    second = store.add(str(write_adapter(tmp_path / "b", seed=2)), "pirate", force=True)
    assert other.resolve("pirate") == second
    with pytest.raises(Failure, match="no adapter"):
        other.resolve(first.version)
    store.remove("pirate")
    assert other.list() == []


def test_a_generation_ends_with_the_version_it_began_with(
    store: AdapterStore, tmp_path: Path
) -> None:
    """One replacement leaves the old files; the next one takes them away."""
    versions = [
        store.add(str(write_adapter(tmp_path / f"{seed}", seed=seed)), "pirate", force=True).version
        for seed in range(2)
    ]
    for version in versions:
        assert store.get(version)[1].version == version
    store.add(str(write_adapter(tmp_path / "2", seed=2)), "pirate", force=True)
    assert store.get(versions[1])[1].name == "pirate"
    with pytest.raises(Failure) as caught:
        store.get(versions[0])
    assert caught.value.code == "ADAPTER_NOT_FOUND"
    assert versions[0] in caught.value.message


def test_a_taken_name_is_not_replaced_unasked(store: AdapterStore, tmp_path: Path) -> None:
    first = store.add(str(write_adapter(tmp_path / "a", seed=1)), "pirate")
    assert store.add(str(tmp_path / "a"), "pirate") == first
    failure = refusal(store, write_adapter(tmp_path / "b", seed=2))
    assert (failure.code, failure.field) == ("BAD_REQUEST", "name")
    assert store.resolve("pirate") == first


@pytest.mark.parametrize("name", ["", "a b", "../x", "a@b", "tiny", "x" * 97, ".hidden"])
def test_names_that_could_be_something_else_are_refused(
    name: str, store: AdapterStore, tmp_path: Path
) -> None:
    assert refusal(store, write_adapter(tmp_path / "in"), name).code == "BAD_REQUEST"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "bias"),
        ({"trainable_token_indices": [1]}, "trainable tokens"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "model's own weights"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 8}, "rank 4"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"a" * 300: 4}}, "alpha_pattern"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    config: dict[str, Any], named: str, store: AdapterStore, tmp_path: Path
) -> None:
    failure = refusal(store, write_adapter(tmp_path / "in", **config))
    assert failure.code == "ADAPTER_LOAD_FAILED"
    assert named in failure.message


def test_tensors_of_other_kinds_are_refused_by_name(store: AdapterStore, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "in")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight"
    save_file(tensors | {name: np.ones((64, 1), np.float32)}, weights)
    assert "lora_magnitude_vector" in refusal(store, folder).message
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, weights)
    assert "model.layers.1.mlp.up_proj lacks" in refusal(store, folder).message


def test_pickles_are_refused(store: AdapterStore, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "in")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert refusal(store, folder).code == "UNSAFE_FORMAT"
    single = write_adapter(tmp_path / "other") / "adapter_model.pt"
    single.touch()
    assert refusal(store, single).code == "UNSAFE_FORMAT"


def test_damage_is_found_before_anything_is_loaded(store: AdapterStore, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "in")
    version = store.add(str(folder), "pirate").version
    path, _ = store.get(version)
    weights = path / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(Failure, match=f"{version} is damaged") as caught:
        store.get(version)
    assert caught.value.code == "ADAPTER_LOAD_FAILED"
    (folder / "adapter_model.safetensors").write_bytes(bytes(content[:-10]))
    assert "not a complete safetensors file" in refusal(store, folder, "cut").message


def test_scales_follow_the_patterns(store: AdapterStore, tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "in",
        lora_alpha=8,
        r=2,
        use_rslora=True,
        rank_pattern={r"layers\.\d+\..*": 4},
        alpha_pattern={"q_proj": 16, r"model\.layers\.1\.mlp\.up_proj": 2},
    )
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    scales = store.add(str(folder), "pirate").scales
    assert scales["model.layers.0.self_attn.q_proj"] == 16 / 4**0.5
    assert scales["model.layers.1.mlp.up_proj"] == 2 / 4**0.5
    assert scales["model.layers.0.mlp.up_proj"] == 8 / 4**0.5
