"""The figures of a worker as Prometheus reads them: under vLLM's and TGI's names and our own;
and those of its GPU, under the names of NVIDIA's DCGM exporter.

Names, labels and buckets of vLLM are those of its metrics page, TGI's those of its router, so that
their dashboards, KEDA and the inference extension of Kubernetes' Gateway API read a worker as they
read these servers. Nothing is counted here: all of it stands in :mod:`workers.figures`.
"""

import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from common.instruments import Distribution, counter, exposition, gauge, histogram
from common.metrics import process_collectors
from common.settings import Compat
from workers.device_watch import DeviceWatch
from workers.engine.flaws import FLAWS
from workers.figures import Figures, MethodFigures
from workers.nvml import GpuFigures

_VLLM = ("model_name", "engine")
"""There is one engine in a worker; Prometheus' own label ``instance`` tells workers apart."""
_DCGM = ("gpu", "UUID", "device", "modelName", "Hostname")
_ENDS = ("stop", "length", "abort", "error")


@dataclass(frozen=True, slots=True)
class Served:
    """What a worker computes with."""

    model: str
    model_version: str
    worker: str
    """Its instance name."""
    revision: str = ""
    weights_sha256: str = ""
    dtype: str = ""
    quant: str = "none"
    max_adapters: int = 0


class WorkerMetrics(Collector):
    """``num_held`` says how many generations it holds, ``adapters`` which versions these need."""

    def __init__(
        self,
        served: Served,
        figures: Figures,
        compat: Sequence[Compat],
        *,
        num_held: Callable[[], int],
        adapters: Callable[[], set[str]],
    ) -> None:
        self._served = served
        self._figures = figures
        self._compat = frozenset(compat)
        self._num_held = num_held
        self._adapters = adapters
        self._labels = [served.model, "0"]
        self.registry = CollectorRegistry()
        process_collectors(self.registry)
        self.registry.register(self)

    def text(self) -> bytes:
        """The exposition, in Prometheus' text format."""
        return exposition(self.registry)

    def collect(self) -> Iterable[Metric]:
        yield from self._own()
        yield self._memory()
        if self._figures.device is not None:
            yield from _of_gpus(self._figures.device)
        if "vllm-current" in self._compat or "vllm-0.10" in self._compat:
            yield from self._vllm_steps()
            yield from self._vllm_generations()
        if "vllm-0.10" in self._compat:
            yield from self._vllm_given_up()
        if "tgi" in self._compat:
            yield from self._tgi()

    # Our own -------------------------------------------------------------------------------------

    def _own(self) -> Iterable[Metric]:
        served, figures, gone = self._served, self._figures, self._figures.generations
        yield gauge(
            "headrace_model_info",
            "1, with the model that this worker computes with.",
            ["model", "model_version", "revision", "weights_sha256", "dtype", "quant"],
            [
                (
                    [
                        served.model,
                        served.model_version,
                        served.revision,
                        served.weights_sha256,
                        served.dtype,
                        served.quant,
                    ],
                    1,
                )
            ],
        )
        yield gauge(
            "headrace_model_load_seconds",
            "How long this worker took to load its model.",
            ["model"],
            [([served.model], figures.load_s)],
        )
        yield gauge(
            "headrace_tokens_per_second",
            "Tokens that this worker generated per second, over the last seconds.",
            ["model_version", "worker"],
            [([served.model_version, served.worker], figures.tokens_per_second)],
        )
        yield gauge(
            "headrace_batch_occupancy_ratio",
            "Generations in the last step over the most there can be.",
            ["model"],
            [([served.model], figures.occupancy)],
        )
        yield histogram(
            "headrace_batch_size",
            "Generations in each step.",
            ["model"],
            [([served.model], figures.batch_sizes)],
        )
        yield gauge(
            "headrace_batch_padding_tokens_ratio",
            "Share of the tokens computed in the last minute that were padding: steps of a GPU have"
            " recorded sizes.",
            ["model"],
            [([served.model], figures.pad_ratio)],
        )
        yield gauge(
            "headrace_kv_used_ratio",
            "Share of the cache, slots or pages, that belongs to a generation.",
            ["model"],
            [([served.model], figures.kv_used)],
        )
        yield histogram(
            "headrace_step_seconds",
            "Time of each step of the engine.",
            ["model"],
            [([served.model], figures.step_s)],
        )
        yield counter(
            "headrace_steps_total",
            "Steps of the engine that computed anything.",
            ["model"],
            [([served.model], figures.num_steps)],
        )
        yield counter(
            "headrace_redeliveries_total",
            "Claims of what another worker had: lease (a worker died with it), or release (it was"
            " handed back).",
            ["cause"],
            [([cause], gone.redeliveries[cause]) for cause in ("lease", "release")],
        )
        yield counter(
            "headrace_migrations_total",
            "Generations with tokens of another attempt: resumed here, or diverged and given back.",
            ["result"],
            [(["resumed"], gone.num_resumed), (["diverged"], gone.num_diverged)],
        )
        yield counter(
            "headrace_tokens_recovered_total",
            "Tokens of other attempts that did not have to be made again.",
            [],
            [([], gone.recovered_tokens)],
        )
        yield counter(
            "headrace_outputs_flagged_total",
            "Answers that were seen to be corrupt, by reason: invalid_utf8, repetition (an endless"
            " short cycle), or grammar (an end that it forbids).",
            ["reason"],
            [([reason], gone.flagged[reason]) for reason in FLAWS],
        )
        yield counter(
            "headrace_duplicate_results_suppressed_total",
            "Generations whose results Redis refused, since somebody else has them.",
            [],
            [([], gone.num_suppressed)],
        )

    def _memory(self) -> Metric:
        figures = self._figures
        kinds: dict[str, int] = {"resident": figures.rss_bytes}
        if figures.device is not None:
            had = figures.device.memory
            kinds["gpu_allocated"] = had.allocated_bytes
            kinds["gpu_reserved"] = had.reserved_bytes
            kinds["gpu_peak"] = had.peak_bytes
        return gauge(
            "headrace_worker_memory_bytes",
            "Memory of this process: resident, and of its GPU in tensors (gpu_allocated, gpu_peak)"
            " or taken for them (gpu_reserved).",
            ["kind"],
            [([kind], taken) for kind, taken in kinds.items()],
        )

    # vLLM's --------------------------------------------------------------------------------------

    def _one(self, value: float) -> list[tuple[list[str], float]]:
        return [(self._labels, value)]

    def _spread(self, name: str, meaning: str, distribution: Distribution) -> Metric:
        return histogram(f"vllm:{name}", meaning, _VLLM, [(self._labels, distribution)])

    def _level(self, name: str, meaning: str, value: float) -> Metric:
        return gauge(f"vllm:{name}", meaning, _VLLM, self._one(value))

    def _count(self, name: str, meaning: str, value: float) -> Metric:
        return counter(f"vllm:{name}", meaning, _VLLM, self._one(value))

    def _vllm_steps(self) -> Iterable[Metric]:
        figures, labels = self._figures, self._labels
        num_held = self._num_held()
        capacity, deferred = figures.waiting, max(0, num_held - figures.running - figures.waiting)
        yield self._level(
            "num_requests_running",
            "Number of requests in model execution batches.",
            figures.running,
        )
        yield self._level(
            "num_requests_waiting", "Claimed requests that have not begun.", capacity + deferred
        )
        yield gauge(
            "vllm:num_requests_waiting_by_reason",
            "The same by reason: capacity (of the cache), or deferred (not ready to run).",
            [*_VLLM, "reason"],
            [([*labels, "capacity"], capacity), ([*labels, "deferred"], deferred)],
        )
        yield self._level(
            "kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", figures.kv_used
        )
        cache = figures.cache
        block = cache.block_tokens or 1
        yield gauge(
            "vllm:cache_config_info",
            "1, with the size of the cache.",
            [*_VLLM, "block_size", "num_gpu_blocks"],
            [([*labels, str(block), str(cache.capacity_tokens // block)], 1)],
        )
        yield self._count(
            "prompt_tokens_total", "Number of prefill tokens processed.", figures.prompt_tokens
        )
        yield self._count(
            "generation_tokens_total",
            "Number of generation tokens processed.",
            figures.generated_tokens,
        )
        yield self._count(
            "num_preemptions_total", "Number of preemptions so far.", figures.num_preempted
        )
        yield self._count(
            "prefix_cache_queries_total",
            "Tokens for which a computed prefix was looked for.",
            figures.queried_tokens,
        )
        yield self._count(
            "prefix_cache_hits_total", "Of these, those that were there.", figures.found_tokens
        )
        sources = {
            "local_compute": figures.prompt_tokens - figures.found_tokens,
            "local_cache_hit": figures.found_tokens,
            "external_kv_transfer": 0,
        }
        yield counter(
            "vllm:prompt_tokens_by_source_total",
            "Prompt tokens, by where their keys and values came from.",
            [*_VLLM, "source"],
            [([*labels, source], count) for source, count in sources.items()],
        )
        yield gauge(
            "vllm:engine_sleep_state",
            "Whether the engine is awake; none of ours ever sleeps.",
            [*_VLLM, "sleep_state"],
            [
                ([*labels, state], state == "awake")
                for state in ("awake", "weights_offloaded", "discard_all")
            ],
        )
        yield self._spread(
            "iteration_tokens_total", "Number of tokens per engine step.", figures.step_tokens
        )
        versions = sorted(version.partition("@")[0] for version in self._adapters())
        yield gauge(
            "vllm:lora_requests_info",
            "When this was read, with the adapters that generations held here need.",
            [*_VLLM, "max_lora", "running_lora_adapters", "waiting_lora_adapters"],
            [([*labels, str(self._served.max_adapters), ",".join(versions), ""], time.time())],
        )

    def _vllm_generations(self) -> Iterable[Metric]:
        told = self._figures.generations
        yield counter(
            "vllm:request_success_total",
            "Count of ended requests, by how they ended.",
            [*_VLLM, "finished_reason"],
            [([*self._labels, reason], told.finished[reason]) for reason in _ENDS],
        )
        yield self._count(
            "corrupted_requests_total", "Requests whose logits were not finite.", told.num_corrupted
        )
        yield self._spread(
            "time_to_first_token_seconds", "Time to first token in seconds.", told.first_token_s
        )
        yield self._spread(
            "inter_token_latency_seconds", "Time between two tokens in seconds.", told.inter_token_s
        )
        yield self._spread(
            "request_time_per_output_token_seconds",
            "Decode time of a request over its tokens but the first.",
            told.per_token_s,
        )
        yield self._spread(
            "e2e_request_latency_seconds", "From admission to the end, in seconds.", told.whole_s
        )
        for part, meaning, distribution in (
            ("queue", "Time in the queue.", told.queue_s),
            ("inference", "From the claim to the end.", told.inference_s),
            ("prefill", "From the claim to the first token.", told.prefill_s),
            ("decode", "From the first token to the end.", told.decode_s),
        ):
            yield self._spread(f"request_{part}_time_seconds", meaning, distribution)
        yield self._spread("request_prompt_tokens", "Tokens of prompts.", told.prompt_sizes)
        yield self._spread("request_generation_tokens", "Tokens of answers.", told.answer_sizes)
        yield self._spread(
            "request_max_num_generation_tokens",
            "Most tokens of the answers to one request; each is counted by itself here.",
            told.answer_sizes,
        )
        yield self._spread(
            "request_params_max_tokens", "The max_tokens that were asked for.", told.allowed_sizes
        )

    def _vllm_given_up(self) -> Iterable[Metric]:
        """What vLLM 0.10 called otherwise."""
        figures = self._figures
        yield self._level("gpu_cache_usage_perc", "As kv_cache_usage_perc.", figures.kv_used)
        yield self._count(
            "gpu_prefix_cache_queries_total",
            "As prefix_cache_queries_total.",
            figures.queried_tokens,
        )
        yield self._count(
            "gpu_prefix_cache_hits_total", "As prefix_cache_hits_total.", figures.found_tokens
        )
        yield self._spread(
            "time_per_output_token_seconds",
            "As inter_token_latency_seconds.",
            figures.generations.inter_token_s,
        )

    # TGI's ---------------------------------------------------------------------------------------

    def _tgi(self) -> Iterable[Metric]:
        figures = self._figures
        methods = {"prefill": figures.prefill, "decode": figures.decode}
        capacity = figures.cache.capacity_tokens
        yield gauge("tgi_batch_current_size", "Current batch size.", [], [([], figures.batch_size)])
        yield gauge(
            "tgi_batch_current_max_tokens",
            "Most tokens that the current batch may come to need.",
            [],
            [([], capacity - figures.free_tokens)],
        )
        yield gauge("tgi_batch_max_total_tokens", "Most tokens of a batch.", [], [([], capacity)])
        yield histogram(
            "tgi_batch_next_size",
            "Requests that came into the batch together.",
            [],
            [([], figures.joined_sizes)],
        )
        yield histogram(
            "tgi_request_skipped_tokens",
            "Tokens of a request that were guessed right, and so took no step of their own.",
            [],
            [([], figures.generations.guessed_sizes)],
        )
        yield counter(
            "tgi_batch_concat",
            "Steps with which requests came into a running batch.",
            ["reason"],
            [(["chunking"], figures.joined)],
        )
        yield counter(
            "tgi_batch_inference_count",
            "Steps, with prompts in them (prefill) or without (decode).",
            ["method"],
            [([name], it.whole_s.count + it.num_refused) for name, it in methods.items()],
        )
        yield counter(
            "tgi_batch_inference_success",
            "Steps that brought something.",
            ["method"],
            [([name], it.whole_s.count) for name, it in methods.items()],
        )
        yield counter(
            "tgi_batch_inference_failure",
            "Steps for which the device had no memory; they were run in parts.",
            ["method"],
            [([name], it.num_refused) for name, it in methods.items()],
        )
        yield from _durations(methods)


def _of_gpus(device: DeviceWatch) -> Iterable[Metric]:
    """Under the names, units and labels of NVIDIA's DCGM exporter. One process of a host tells of a
    GPU, however many share it.
    """
    host = socket.gethostname()
    parts: tuple[tuple[str, str, Callable[[GpuFigures], float | None]], ...] = (
        ("GPU_UTIL", "GPU utilization (in %).", lambda it: it.busy_percent),
        ("FB_USED", "Memory in use (in MiB).", lambda it: _mib(it.used_bytes)),
        ("FB_FREE", "Memory that is free (in MiB).", lambda it: _mib(it.free_bytes)),
        ("POWER_USAGE", "Power draw (in W).", lambda it: it.power_w),
        ("GPU_TEMP", "Temperature (in C).", lambda it: it.temperature_c),
        (
            "XID_ERRORS",
            "Number of the last Xid since this worker began; 0: none.",
            lambda it: device.xids.get(it.gpu.uuid, 0),
        ),
    )
    seen = device.gpus
    for name, meaning, part in parts:
        told = [(it.gpu, part(it)) for it in seen]
        series = [
            ([str(gpu.index), gpu.uuid, f"nvidia{gpu.index}", gpu.name, host], value)
            for gpu, value in told
            if value is not None
        ]
        if series:
            yield gauge(f"DCGM_FI_DEV_{name}", meaning, _DCGM, series)


def _mib(num_bytes: int | None) -> int | None:
    return None if num_bytes is None else num_bytes >> 20


def _durations(methods: dict[str, MethodFigures]) -> Iterable[Metric]:
    parts: tuple[tuple[str, str, Callable[[MethodFigures], Distribution]], ...] = (
        ("inference", "Time of a step.", lambda it: it.whole_s),
        ("forward", "Time to compute a step and choose its tokens.", lambda it: it.forward_s),
        ("decode", "Time to make text of a step's tokens.", lambda it: it.text_s),
        ("filter", "Time to take out who ended.", lambda it: it.leave_s),
        ("concat", "Time to let new requests in.", lambda it: it.join_s),
    )
    for name, meaning, part in parts:
        series = [([method], part(figures)) for method, figures in methods.items()]
        yield histogram(f"tgi_batch_{name}_duration", meaning, ["method"], series)
