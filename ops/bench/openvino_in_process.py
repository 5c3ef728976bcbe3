"""OpenVINO GenAI's continuous batching without a server: what `headrace bench engine` is for ours.

Runs in OpenVINO's own environment, so it imports nothing of Headrace. Arguments: the model's folder
(IR), numbers of generations at once, tokens of a prompt, new tokens. The last line is JSON.
"""

import json
import statistics
import sys
import time
from importlib import import_module
from typing import Any


def main() -> None:
    openvino_genai = import_module("openvino_genai")
    folder, counts, prompt_tokens, new_tokens = sys.argv[1:]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2  # GiB, as vLLM has it
    scheduler.max_num_seqs = 64
    scheduler.dynamic_split_fuse = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU")
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = int(new_tokens)
    config.ignore_eos = True
    config.do_sample = False
    concurrency = [int(count) for count in counts.split(",")]
    measure(pipeline, config, max(concurrency), int(prompt_tokens))
    rows = [measure(pipeline, config, count, int(prompt_tokens)) for count in concurrency]
    print(json.dumps(rows))


def measure(pipeline: Any, config: Any, concurrency: int, prompt_tokens: int) -> dict[str, float]:
    """Run so many generations from submission to end; the figures of ``ops.bench.engine``."""
    numpy, openvino = import_module("numpy"), import_module("openvino")
    handles: dict[int, Any] = {}
    for number in range(concurrency):
        ids = [3 + (number * 7919 + place * 104_729) % 250 for place in range(prompt_tokens)]
        prompt = openvino.Tensor(numpy.array([ids], dtype="int64"))
        handles[number] = pipeline.add_request(number, prompt, config)
    began_s, num_tokens = time.monotonic(), 0
    first_ms: dict[int, float] = {}
    step_ms: list[float] = []
    while pipeline.has_non_finished_requests():
        step_began_s = time.monotonic()
        pipeline.step()
        now_s = time.monotonic()
        step_ms.append((now_s - step_began_s) * 1000)
        for number, handle in handles.items():
            if handle.can_read():
                for output in handle.read().values():
                    num_tokens += len(output.generated_ids)
                first_ms.setdefault(number, (now_s - began_s) * 1000)
    return {
        "concurrency": concurrency,
        "tokens_per_second": num_tokens / (time.monotonic() - began_s),
        "time_to_first_token_p50": statistics.median(first_ms.values()),
        "time_to_first_token_max": max(first_ms.values()),
        "step_p50": statistics.median(step_ms),
        "step_max": max(step_ms),
    }


if __name__ == "__main__":
    main()
