"""The compiled kernels as typed functions over torch tensors: find, check the processor, load.

:func:`load` gives the library or the reason why there is none; nothing is opened at import. An
:class:`Engine` owns threads, packed weights and scratch memory. ctypes releases the GIL for each
call, so the engine's arithmetic never blocks the event loop of its process.
"""

import ctypes
import platform
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

_AVX512 = 1
_AMX = 2

_DONE = 0
_UNKNOWN_PLACE = 2

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
"""Those that :meth:`Engine.gated_mlp` knows; ``gelu_tanh`` is torch's ``approximate="tanh"``."""

MAX_HEAD_SIZE = 256

MAX_GROUP = 128
"""Query heads per key head that attention can hold."""


@dataclass(frozen=True, slots=True)
class Library:
    """The kernels, on a processor that runs them."""

    functions: ctypes.CDLL
    has_amx: bool


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why there are no kernels here; ``reason`` completes "native kernels are off: …"."""

    reason: str


class Span(Protocol):
    """Neighbouring positions of one slot; see :class:`workers.model.attention.Stretch`."""

    @property
    def slot(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def count(self) -> int: ...


@cache
def load() -> Library | Unavailable:
    """The library built at installation, if it is there and this processor runs it."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return Unavailable("not Linux on x86-64")
    path = Path(__file__).with_name(f"kernels{sysconfig.get_config_var('EXT_SUFFIX')}")
    if not path.exists():
        return Unavailable("no compiler at install")
    return open_library(path)


def open_library(path: Path) -> Library | Unavailable:
    """The library at ``path``, if this processor runs it."""
    try:
        functions = ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        return Unavailable(f"{path.name} does not load: {error}")
    features: int = functions.headrace_features()
    if not features & _AVX512:
        return Unavailable("processor lacks avx512_bf16 or avx512vbmi")
    try:
        _declare(functions)
    except AttributeError:
        return Unavailable(f"{path.name} was built from an older source: make native")
    return Library(functions, has_amx=bool(features & _AMX))


class Weight:
    """A packed weight; lives as long as its engine."""

    __slots__ = ("handle", "num_inputs", "num_outputs")

    def __init__(self, handle: int, num_outputs: int, num_inputs: int) -> None:
        self.handle = handle
        self.num_outputs = num_outputs
        self.num_inputs = num_inputs


class _Vectors(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("token_stride", ctypes.c_ssize_t),
        ("head_stride", ctypes.c_ssize_t),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        ("num_heads", ctypes.c_int),
        ("num_kv_heads", ctypes.c_int),
        ("size", ctypes.c_int),
        ("window", ctypes.c_int),
        ("max_tokens", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


class LayerPointers(ctypes.Structure):
    """A layer of :class:`ModelPointers`: handles of packed weights, then float32 vectors and the
    cache by address; None where there is none.
    """

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("qkv", "out", "gate_up", "down")],
        *[(name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm")],
        *[(name, ctypes.c_void_p) for name in ("query_norm", "key_norm")],
        *[(name, ctypes.c_void_p) for name in ("keys", "values")],
        ("window", ctypes.c_int),
    ]


class ModelPointers(ctypes.Structure):
    """A Llama-like model for :class:`Step`; ``HeadraceModel`` in kernels.cpp says what is what."""

    _fields_ = [
        *[(name, ctypes.c_int) for name in ("num_layers", "hidden", "num_heads", "num_kv_heads")],
        *[(name, ctypes.c_int) for name in ("size", "vocab", "activation")],
        *[(name, ctypes.c_int) for name in ("num_slots", "max_tokens")],
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("layers", ctypes.POINTER(LayerPointers)),
        *[(name, ctypes.c_void_p) for name in ("last_norm", "head", "embedding")],
        *[(name, ctypes.c_void_p) for name in ("cosines", "sines")],
    ]


class SamplingRow(ctypes.Structure):
    """A row of :meth:`Engine.sample`; ``HeadraceSamplingRow`` in sampler.h says what is what. All
    zeros are a plain greedy row.
    """

    _fields_ = [
        *[(name, ctypes.c_uint64) for name in ("seed", "position")],
        *[(name, ctypes.c_void_p) for name in ("seen_ids", "seen_in_all", "seen_in_answer")],
        *[(name, ctypes.c_void_p) for name in ("bias_ids", "biases", "banned", "mask")],
        *[(name, ctypes.c_int32) for name in ("num_seen", "num_biases")],
        *[(name, ctypes.c_int32) for name in ("num_banned", "num_mask_words")],
        *[(name, ctypes.c_double) for name in ("repetition", "frequency")],
        *[(name, ctypes.c_double) for name in ("presence", "relative")],
        ("watermark_key", ctypes.c_uint64),
        ("watermark_bound", ctypes.c_int32),
        ("watermark_delta", ctypes.c_float),
        *[(name, ctypes.c_int32) for name in ("is_drawn", "top_k")],
        *[(name, ctypes.c_float) for name in ("temperature", "top_p", "log_min_p", "typical_p")],
        ("num_tops", ctypes.c_int32),
        *[(name, ctypes.c_void_p) for name in ("top_ids", "top_logprobs")],
        ("token", ctypes.c_int64),
        ("logprob", ctypes.c_float),
        ("outcome", ctypes.c_int32),
        ("num_tops_found", ctypes.c_int32),
    ]


class Places:
    """Where a step's tokens lie, in the form the kernels take; made once, used in each layer."""

    __slots__ = ("count", "counts", "num_tokens", "slots", "starts")

    def __init__(self, stretches: Sequence[Span]) -> None:
        self.count = len(stretches)
        array = ctypes.c_int * self.count
        self.slots = array(*[stretch.slot for stretch in stretches])
        self.starts = array(*[stretch.start for stretch in stretches])
        self.counts = array(*[stretch.count for stretch in stretches])
        self.num_tokens = sum(self.counts)


class Engine:
    """Threads, packed weights and scratch memory for the kernels; for one thread at a time.

    All inputs are bfloat16 tensors on the CPU; only their last dimension is the row, whatever
    stands before it. Weights of norms and biases are float32.

    With ``quantize`` matrices are packed in 8 bits: whole numbers of -127 to 127, with a scale for
    each 32 inputs of an output. Half of the bytes are read, which is what a step of few rows takes
    its time for; inputs and sums stay as they are.

    Raises:
        MemoryError: from any method, if memory or threads cannot be had.
    """

    def __init__(
        self,
        library: Library,
        num_threads: int,
        *,
        use_amx: bool | None = None,
        quantize: bool = False,
    ) -> None:
        """``use_amx`` None: where the processor has it, and rows are many enough."""
        self._handle: int | None = None
        self._quantize = quantize
        self.num_threads = num_threads
        self.uses_amx = library.has_amx if use_amx is None else use_amx
        self.functions = library.functions
        self._handle = self.functions.headrace_engine_new(num_threads, self.uses_amx)
        if not self._handle:
            raise MemoryError(f"no {num_threads} threads for the kernels")

    def close(self) -> None:
        """End the threads and free all packed weights. Nothing may be called after."""
        handle, self._handle = self._handle, None
        if handle:
            self.functions.headrace_engine_free(handle)

    def __del__(self) -> None:
        self.close()

    @property
    def handle(self) -> int:
        """For functions of the library that take the engine."""
        if self._handle is None:
            raise ValueError("the engine is closed")
        return self._handle

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Weight:
        """Copy ``weight`` ``[outputs, inputs]`` into the layout of the product.

        Weights lie in memory in the order of these calls; the order of use is the fastest.
        """
        return self._pack(weight, None, bias, None)

    def pack_gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> Weight:
        """The first two weights of a gated MLP as one, for :meth:`gated_mlp` only."""
        if gate.shape != up.shape:
            raise ValueError("gate and up differ in shape")
        if (gate_bias is None) != (up_bias is None):
            raise ValueError("a bias on one of gate and up only")
        return self._pack(gate, up, gate_bias, up_bias)

    def _pack(
        self,
        weight: torch.Tensor,
        other: torch.Tensor | None,
        bias: torch.Tensor | None,
        other_bias: torch.Tensor | None,
    ) -> Weight:
        rows = _bf16(weight)
        others = None if other is None else _bf16(other)
        floats = [
            None if b is None else b.detach().float().contiguous() for b in (bias, other_bias)
        ]
        num_outputs, num_inputs = rows.shape
        handle: int | None = self.functions.headrace_weight_new(
            self.handle,
            num_outputs,
            num_inputs,
            rows.data_ptr(),
            None if others is None else others.data_ptr(),
            *[None if b is None else b.data_ptr() for b in floats],
            self._quantize,
        )
        if not handle:
            raise MemoryError(f"no memory for a weight of {num_outputs} x {num_inputs}")
        return Weight(handle, num_outputs, num_inputs)

    def linear(
        self, weight: Weight, x: torch.Tensor, *, dtype: torch.dtype = torch.bfloat16
    ) -> torch.Tensor:
        """``x`` ``[…, inputs]`` times ``weight``, plus its bias: ``[…, outputs]``.

        ``dtype`` of the answer is bfloat16 or float32.
        """
        x = _rows(x, weight.num_inputs)
        output = x.new_empty((*x.shape[:-1], weight.num_outputs), dtype=dtype)
        is_float = dtype == torch.float32
        self._check(
            self.functions.headrace_linear(
                self.handle,
                weight.handle,
                x.data_ptr(),
                _num_rows(x),
                None if is_float else output.data_ptr(),
                output.data_ptr() if is_float else None,
            )
        )
        return output

    def gated_mlp(
        self, gate_up: Weight, down: Weight, activation: str, x: torch.Tensor
    ) -> torch.Tensor:
        """``down(activation(gate(x)) * up(x))``; ``activation`` is one of ``ACTIVATIONS``."""
        x = _rows(x, gate_up.num_inputs)
        if down.num_inputs != gate_up.num_outputs:
            raise ValueError("down does not take what gate and up give")
        output = x.new_empty((*x.shape[:-1], down.num_outputs))
        self._check(
            self.functions.headrace_gated_mlp(
                self.handle,
                gate_up.handle,
                down.handle,
                ACTIVATIONS[activation],
                x.data_ptr(),
                _num_rows(x),
                output.data_ptr(),
            )
        )
        return output

    def gate(
        self,
        gate_up: Weight,
        activation: str,
        x: torch.Tensor,
        more_gate: torch.Tensor,
        more_up: torch.Tensor,
    ) -> torch.Tensor:
        """``activation(gate(x) + more_gate) * (up(x) + more_up)``; what is added is float32."""
        x = _rows(x, gate_up.num_inputs)
        output = x.new_empty((*x.shape[:-1], gate_up.num_outputs))
        more = [tensor.float().contiguous() for tensor in (more_gate, more_up)]
        if any(tensor.numel() != output.numel() for tensor in more):
            raise ValueError("what is added differs in shape from what it is added to")
        self._check(
            self.functions.headrace_gate(
                self.handle,
                gate_up.handle,
                ACTIVATIONS[activation],
                x.data_ptr(),
                _num_rows(x),
                *[tensor.data_ptr() for tensor in more],
                output.data_ptr(),
            )
        )
        return output

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """``x / rms(x) * weight``; ``weight`` is float32 (Gemma's must be given as 1 + w)."""
        x = _rows(x, weight.numel())
        output = torch.empty_like(x)
        self.functions.headrace_rms_norm(
            self.handle,
            x.data_ptr(),
            weight.data_ptr(),
            _num_rows(x),
            x.shape[-1],
            eps,
            output.data_ptr(),
        )
        return output

    def layer_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """Layer norm over the last dimension; ``weight`` and ``bias`` are float32."""
        x = _rows(x, x.shape[-1] if weight is None else weight.numel())
        output = torch.empty_like(x)
        self.functions.headrace_layer_norm(
            self.handle,
            x.data_ptr(),
            None if weight is None else weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            _num_rows(x),
            x.shape[-1],
            eps,
            output.data_ptr(),
        )
        return output

    def attend(
        self,
        places: Places,
        cache: tuple[torch.Tensor, torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Store ``key`` and ``value``, then let each token see its sequence up to itself.

        ``cache`` is a layer's keys and values, ``[slot, kv head, position, size]`` and contiguous;
        the others are ``[tokens, heads, size]``, tokens in the order of ``places``, with any
        strides of tokens and heads. The answer is ``[tokens, heads, size]``.
        """
        keys, values = cache
        num_tokens, num_heads, size = query.shape
        if num_tokens != places.num_tokens:
            raise ValueError(f"{num_tokens} tokens, but stretches of {places.num_tokens}")
        layer = _Attention(
            num_heads,
            keys.shape[1],
            size,
            window or 0,
            keys.shape[2],
            scale,
            softcap or 0.0,
            keys.data_ptr(),
            values.data_ptr(),
        )
        query, key, value = (_heads(x, size) for x in (query, key, value))
        output = query.new_empty((num_tokens, num_heads, size))
        self._check(
            self.functions.headrace_attend(
                self.handle,
                ctypes.byref(layer),
                places.count,
                places.slots,
                places.starts,
                places.counts,
                _vectors(query),
                _vectors(key),
                _vectors(value),
                output.data_ptr(),
            )
        )
        return output

    def sample(self, logits: torch.Tensor, rows: "ctypes.Array[SamplingRow]") -> None:
        """Choose a token by each of ``logits`` ``[rows, vocab]``, in float32 or bfloat16.

        The choices are written into ``rows``; what these point to must live until then.
        """
        num_rows, vocab_size = logits.shape
        is_bf16 = logits.dtype == torch.bfloat16
        if not (is_bf16 or logits.dtype == torch.float32) or not logits.is_contiguous():
            raise ValueError("logits must be contiguous, and float32 or bfloat16")
        if len(rows) != num_rows:
            raise ValueError(f"parameters of {len(rows)} rows for logits of {num_rows}")
        self._check(
            self.functions.headrace_sample(
                self.handle, logits.data_ptr(), is_bf16, num_rows, vocab_size, rows
            )
        )

    def _check(self, succeeded: int) -> None:
        if not succeeded:
            raise MemoryError("no scratch memory for the kernels")


class Step:
    """Whole steps of a Llama-like model on an engine, with scratch memory of their own.

    What ``model`` points to must outlive this.

    Raises:
        MemoryError: if there is no scratch memory for ``num_tokens`` at a time.
    """

    def __init__(self, engine: Engine, model: ModelPointers, num_tokens: int) -> None:
        self._engine = engine  # must outlive us too
        self._handle: int | None = engine.functions.headrace_step_new(
            engine.handle, ctypes.byref(model), num_tokens
        )
        if not self._handle:
            raise MemoryError(f"no scratch memory for steps of {num_tokens} tokens")

    def close(self) -> None:
        """Free the scratch memory. Nothing may be called after."""
        handle, self._handle = self._handle, None
        if handle:
            self._engine.functions.headrace_step_free(handle)

    def __del__(self) -> None:
        self.close()

    def run(
        self,
        tokens: Sequence[int],
        places: Places,
        rows: Sequence[int],
        logits: torch.Tensor,
        adapters: Sequence[int | None] | None = None,
    ) -> None:
        """Compute ``tokens`` at ``places`` and write ``logits`` ``[len(rows), vocab]`` of ``rows``.

        ``adapters`` holds for each stretch the address of its adapter, if any stretch has one; see
        :mod:`workers.model.native.adapters`.

        Raises:
            ValueError: for a token, place or row that the model or its cache does not have.
            MemoryError: if there is no scratch memory for so many tokens.
        """
        if self._handle is None or not self._engine.handle:
            raise ValueError("the step is closed")
        result = self._engine.functions.headrace_step_run(
            self._handle,
            len(tokens),
            (ctypes.c_int * len(tokens))(*tokens),
            places.count,
            places.slots,
            places.starts,
            places.counts,
            None if adapters is None else (ctypes.c_void_p * places.count)(*adapters),
            len(rows),
            (ctypes.c_int * len(rows))(*rows),
            logits.data_ptr(),
        )
        if result == _UNKNOWN_PLACE:
            raise ValueError("a token, place or row is not in the model or its cache")
        if result != _DONE:
            raise MemoryError(f"no scratch memory for a step of {len(tokens)} tokens")


def can_attend(num_heads: int, num_kv_heads: int, key_size: int, value_size: int) -> bool:
    """Whether :meth:`Engine.attend` takes such a layer."""
    return (
        key_size == value_size
        and key_size <= MAX_HEAD_SIZE
        and num_heads % num_kv_heads == 0
        and num_heads // num_kv_heads <= MAX_GROUP
    )


def _bf16(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.bfloat16).contiguous()


def _rows(x: torch.Tensor, width: int) -> torch.Tensor:
    if x.dtype != torch.bfloat16 or x.shape[-1] != width:
        raise ValueError(f"expected bfloat16 rows of {width}, not {x.dtype} {tuple(x.shape)}")
    return x.contiguous()


def _num_rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def _heads(x: torch.Tensor, size: int) -> torch.Tensor:
    if x.dtype != torch.bfloat16 or x.shape[-1] != size:
        raise ValueError(f"expected bfloat16 heads of {size}, not {x.dtype} {tuple(x.shape)}")
    return x if x.stride(-1) == 1 else x.contiguous()


def _vectors(x: torch.Tensor) -> _Vectors:
    return _Vectors(x.data_ptr(), x.stride(0), x.stride(1))


def _declare(functions: ctypes.CDLL) -> None:
    """Types of the arguments, as in the last section of kernels.cpp."""
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    integers = ctypes.POINTER(ctypes.c_int)
    vectors = ctypes.POINTER(_Vectors)
    signatures: dict[str, tuple[object, Sequence[object]]] = {
        "engine_new": (pointer, [integer, integer]),
        "engine_free": (None, [pointer]),
        "weight_new": (pointer, [pointer, integer, integer, *[pointer] * 4, integer]),
        "linear": (integer, [pointer, pointer, pointer, integer, pointer, pointer]),
        "gated_mlp": (integer, [pointer, pointer, pointer, integer, pointer, integer, pointer]),
        "gate": (integer, [pointer, pointer, integer, pointer, integer, *[pointer] * 3]),
        "rms_norm": (None, [pointer, pointer, pointer, integer, integer, real, pointer]),
        "layer_norm": (None, [*[pointer] * 4, integer, integer, real, pointer]),
        "attend": (
            integer,
            [
                pointer,
                ctypes.POINTER(_Attention),
                integer,
                integers,
                integers,
                integers,
                vectors,
                vectors,
                vectors,
                pointer,
            ],
        ),
        "step_new": (pointer, [pointer, ctypes.POINTER(ModelPointers), integer]),
        "step_free": (None, [pointer]),
        "step_run": (
            integer,
            [
                pointer,
                integer,
                integers,
                integer,
                *[integers] * 3,
                ctypes.POINTER(pointer),
                integer,
                integers,
                pointer,
            ],
        ),
        "sample": (
            integer,
            [pointer, pointer, integer, integer, integer, ctypes.POINTER(SamplingRow)],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(functions, f"headrace_{name}")
        function.restype = result
        function.argtypes = arguments
