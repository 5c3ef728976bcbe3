"""The kernels are there where they can run, and nowhere else do they get in the way."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.native_kernels import ROOT, compile_shared
from workers.model.native import binding
from workers.model.native.binding import Library, Unavailable, load, open_library

NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_bf16"}


def processor_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def test_the_kernels_run_exactly_where_the_processor_allows() -> None:
    """On a machine with the instructions and a compiler they are loaded; elsewhere one reason."""
    found = load()
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        assert found == Unavailable("not Linux on x86-64")
    elif not shutil.which(os.environ.get("CXX", "g++")):
        assert isinstance(found, Library) or found == Unavailable("no compiler at install")
    elif processor_flags() >= NEEDED:
        assert isinstance(found, Library)
        assert found.has_amx <= (processor_flags() >= {"amx_tile", "amx_bf16"})
    else:
        assert found == Unavailable("processor lacks avx512_bf16 or avx512vbmi")


def test_without_a_built_library_there_is_a_reason(tmp_path: Path) -> None:
    """As after an installation without a compiler."""
    copy = Path(shutil.copy(binding.__file__, tmp_path / "native_without_kernels.py"))
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[copy.stem] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        assert module.load().reason == "no compiler at install"
    finally:
        del sys.modules[copy.stem]


def test_a_processor_without_the_instructions_is_told_apart(tmp_path: Path) -> None:
    """The library is asked what the processor can do before any of it runs."""
    source = tmp_path / "old_processor.cpp"
    source.write_text('extern "C" int headrace_features() { return 0; }\n')
    compile_shared([source], tmp_path / "old_processor.so", "-shared", "-fPIC")
    found = open_library(tmp_path / "old_processor.so")
    assert found == Unavailable("processor lacks avx512_bf16 or avx512vbmi")


def test_a_library_of_an_older_source_is_a_reason_not_an_error(tmp_path: Path) -> None:
    """As after an update without an installation: functions that are called now are not in it."""
    source = tmp_path / "older.cpp"
    source.write_text('extern "C" int headrace_features() { return 1; }\n')
    compile_shared([source], tmp_path / "older.so", "-shared", "-fPIC")
    assert open_library(tmp_path / "older.so") == Unavailable(
        "older.so was built from an older source: make native"
    )


def test_a_broken_library_is_a_reason_not_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "kernels.so"
    broken.write_bytes(b"not a library")
    found = open_library(broken)
    assert isinstance(found, Unavailable)
    assert "kernels.so does not load" in found.reason


@pytest.mark.parametrize("has_compiler", [True, False])
def test_installation_succeeds_with_and_without_a_compiler(
    has_compiler: bool, tmp_path: Path
) -> None:
    """setuptools builds the kernels where it can; where not, it says so and goes on."""
    source = tmp_path / "workers" / "model" / "native" / "kernels.cpp"
    source.parent.mkdir(parents=True)
    source.write_text('extern "C" int headrace_features() { return 0; }\n')
    source.with_name("sampler.cpp").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = "import setuptools; setuptools.setup()"
    compilers = {} if has_compiler else {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "-c", command, "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, **compilers},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert has_compiler == bool(list(source.parent.glob("*.so")))
    assert has_compiler or "no-such-compiler" in done.stderr
