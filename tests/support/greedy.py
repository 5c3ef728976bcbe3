"""What transformers itself answers, greedily and in float32: the reference of every cache."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

PROMPTS = (
    "Hello the world, and all that is longer than a sliding window of 24 positions",
    "a",
    "The 😀 thing",
    "and so on and on",
)


def generate(path: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers says, alone and undisturbed."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    output = model.generate(  # pyright: ignore[reportAttributeAccessIssue] - wrongly annotated
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    return output[0, len(prompt) :].tolist()
