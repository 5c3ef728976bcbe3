"""The tiny model, built once; and one thread for torch, whose matrices here are not worth two."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.models.tokenizer import Tokenizer
from tests.support.native_kernels import are_runnable
from tests.support.tiny_model import build_tiny_model

# Where the kernels cannot run there is nothing to compute with; test_native_binding.py runs always
# and fails where they should be able to.
collect_ignore = (
    []
    if are_runnable()
    else ["test_native_operations.py", "test_native_sampler.py", "test_native_step.py"]
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model)
