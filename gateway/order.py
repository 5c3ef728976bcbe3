"""What a client asks for, whatever wire it came over: a prompt as tokens, and how to answer."""

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from common.broker import Presentation
from common.messages import Lane, Sampling

Api = Literal["tgi", "chat", "completion", "response"]

INCLUDE_USAGE = 1
"""OpenAI: a usage chunk before the end."""
DETAILS = 2
"""TGI: ``details`` with the last event or the answer."""
FULL_TEXT = 4
"""TGI: ``generated_text`` begins with the prompt."""
AS_LIST = 8
"""TGI's ``POST /``: the answer is a list of one."""
SHOW_TIER = 16
"""OpenAI: the request named a ``service_tier``, so the answer echoes it."""
LOGPROBS = 32
"""OpenAI: each choice tells the log-probabilities of its tokens."""
ECHO = 64
"""Completions: the text begins with the prompt."""
PREFILL = 128
"""TGI: ``details`` tells the tokens of the prompt."""
AS_PREDICTIONS = 256
"""TGI's ``/vertex``: the answer is a list of texts."""
TOOLS = 512
"""Chat and responses: the answer may hold calls of tools."""


class ResponseDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What a response (``/v1/responses``) says beside its tokens; kept in Redis beside its log.

    Whoever has both can show the response, on any gateway.
    """

    tenant: str
    echo: dict[str, Any]
    """Fields of the response that repeat the request."""
    items: list[dict[str, Any]]
    """All that was put in, the conversation before it first."""
    is_background: bool = False
    is_stored: bool = True
    """False: nobody can ask for it by its id, and nothing can follow on it."""
    presentation: Presentation = Presentation("response", 0, 0, 0)
    """As it was admitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """``flags`` are the bits above; they travel with the generation (see ``Presentation``)."""

    api: Api
    prompt: list[int]
    sampling: Sampling
    stream: bool
    flags: int = 0
    prompt_text: str = ""
    """Only kept where the answer repeats it."""
    num_prompt_characters: int = 0
    lane: Lane = "default"
    adapter: str = ""
    """Version of a LoRA adapter, ``name@digest``; empty: the model alone."""
    num_choices: int = 1
    """Answers to the one prompt, each a generation of its own."""
    num_best: int = 0
    """Only so many of the choices are answers, the likeliest by token; 0: all, in their order."""
    document: ResponseDocument | None = None
    """Of a response; other APIs have none."""
    retention_s: float | None = None
    """How long the answer can be read after its end; None: as long as any stream."""

    @property
    def cost(self) -> int:
        """Cache positions of one choice: prompt plus allowed new tokens."""
        return len(self.prompt) + self.sampling.max_new_tokens
