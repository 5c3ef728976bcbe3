"""Make an ordinary model directory out of one GGUF file, once.

Needs torch, transformers, accelerate and gguf (the ``worker`` extra), all imported where they are
used: everything else about models works without them.
"""

from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from common.failures import Failure
from common.models.files import TOKENIZER_FILE, JsonObject, read_json, to_json

if TYPE_CHECKING:
    from gguf import GGUFReader

Progress = Callable[[str, int, int], None]

_GPT2_PRE_TOKENIZERS = frozenset({"gpt-2", "mpt", "olmo", "phi-2"})
"""Texts are split as GPT-2 does: what transformers builds for any byte-level vocabulary."""
_DIGIT_PRE_TOKENIZERS = frozenset({"command-r", "refact", "smollm", "starcoder"})
"""As GPT-2, but each digit stands alone. transformers does not know these: without the digits split
off, a run of spaces before a number is cut elsewhere than in training."""

_DENSE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def convert_gguf(gguf_file: Path, into: Path, on_progress: Progress) -> str:
    """Write configuration, tokenizer with chat template and safetensors into the folder ``into``.

    Returns the licence that the file names, or ``unknown``.

    Raises:
        Failure: MODEL_LOAD_FAILED, if the file cannot be converted or a library is missing.
    """
    try:
        import transformers
    except ImportError as error:  # pragma: no cover
        raise _missing(error) from error

    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        on_progress(f"reading {gguf_file.name}", 0, 0)
        reader = _reader(gguf_file)
        # transformers looks for more files beside the GGUF; here it finds none.
        with TemporaryDirectory(prefix="headrace-gguf-") as folder:
            link = Path(folder) / "model.gguf"
            link.symlink_to(gguf_file.resolve())
            _write_tokenizer(reader, link, into)
            on_progress(f"converting {gguf_file.name}", 0, 0)
            _write_weights(link, into, _weights_dtype(reader))
        _tidy_configs(reader, into)
        return str(_field(reader, "general.license") or "unknown")
    except ImportError as error:
        raise _missing(error) from error
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise Failure("MODEL_LOAD_FAILED", f"{gguf_file} cannot be converted: {error}") from error
    finally:
        if bars:
            transformers.logging.enable_progress_bar()


def _reader(gguf_file: Path) -> "GGUFReader":
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise _missing(error) from error
    try:
        return GGUFReader(gguf_file)
    except (OSError, ValueError, IndexError) as error:
        raise Failure("MODEL_LOAD_FAILED", f"{gguf_file} is not a GGUF file: {error}") from error


def _missing(error: ImportError) -> Failure:
    return Failure(
        "MODEL_LOAD_FAILED",
        f"Converting GGUF needs torch and more: pip install 'headrace[worker]' ({error})",
    )


def _field(reader: "GGUFReader", key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _weights_dtype(reader: "GGUFReader") -> str:
    """The dtype to store: the file's own where it is not quantized, else bfloat16.

    Dequantized values fit no 16-bit type exactly, but rounding them to bfloat16 (2⁻⁹ relative)
    stays below the error that quantizing to 8 bits or fewer has already made. In return a float32
    engine and a bfloat16 engine compute with the very same weights, as they do with the original
    (published in bfloat16), the file is half the size, and a bfloat16 engine maps it as it is.
    """
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        name = tensor.tensor_type.name
        sizes[name] = sizes.get(name, 0) + int(tensor.n_bytes)
    largest = max(sizes, key=lambda name: sizes[name], default="F32")
    return _DENSE_DTYPES.get(largest, "bfloat16")


def _write_weights(gguf_file: Path, into: Path, dtype: str) -> None:
    """Dequantize in float32 and save.

    transformers refuses to save a model that was loaded from GGUF, so the weights move into a twin
    that is built from the configuration. Tied embeddings are saved once.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    with redirect_stderr(StringIO()):  # a progress bar that no setting of transformers reaches
        loaded, report = cast("Any", AutoModelForCausalLM).from_pretrained(
            str(gguf_file.parent),
            gguf_file=gguf_file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    # What is missing was filled with random numbers; transformers only warns of it.
    if wrong := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
        raise ValueError(
            f"{len(wrong)} tensors are missing or of another shape, such as {wrong[0]}"
        )
    config = loaded.config
    vars(config).pop("quantization_config", None)
    stored = getattr(torch, dtype)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, dtype=stored)
    weights = {name: tensor.to(stored) for name, tensor in loaded.state_dict().items()}
    twin.load_state_dict(weights, assign=True)
    twin.tie_weights()
    twin.generation_config = loaded.generation_config
    twin.save_pretrained(into)


def _write_tokenizer(reader: "GGUFReader", gguf_file: Path, into: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = _field(reader, "tokenizer.ggml.model")
    pre = _field(reader, "tokenizer.ggml.pre")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        str(gguf_file.parent), gguf_file=gguf_file.name
    )
    backend = tokenizer.backend_tokenizer
    if kind == "gpt2" and pre in _DIGIT_PRE_TOKENIZERS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif kind == "gpt2" and pre not in _GPT2_PRE_TOKENIZERS | _known_splits():
        raise ValueError(
            f"its tokenizer splits text in a way that is not known here (tokenizer.ggml.pre is"
            f" {pre!r}); use the safetensors version of the model"
        )
    backend.save(str(into / TOKENIZER_FILE))
    (into / "tokenizer_config.json").write_bytes(to_json(_tokenizer_config(reader, tokenizer)))


def _known_splits() -> frozenset[str]:
    """Pre-tokenizers whose regular expression transformers applies by itself."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)


def _tokenizer_config(reader: "GGUFReader", tokenizer: Any) -> JsonObject:
    config: JsonObject = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if (text := getattr(tokenizer, key)) is not None:
            config[key] = str(text)
    architecture = _field(reader, "general.architecture")
    if length := _field(reader, f"{architecture}.context_length"):
        config["model_max_length"] = int(length)
    if template := _field(reader, "tokenizer.chat_template"):
        config["chat_template"] = str(template)
    return config


def _tidy_configs(reader: "GGUFReader", into: Path) -> None:
    """Keep what describes the model, drop what describes this conversion.

    The version of a model hashes these files, and must not change with transformers' own version.
    """
    found = [_field(reader, f"tokenizer.ggml.{key}") for key in _EOS_KEYS]
    eos_token_ids = sorted({int(token) for token in found if token is not None})
    for name in ("config.json", "generation_config.json"):
        path = into / name
        config = read_json(path)
        for key in ("transformers_version", "_name_or_path", "_from_model_config"):
            config.pop(key, None)
        if eos_token_ids:
            config["eos_token_id"] = eos_token_ids[0] if len(eos_token_ids) == 1 else eos_token_ids
        path.write_bytes(to_json(config))
