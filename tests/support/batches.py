"""Batches in short forms: lines, the files that they stand in, and records."""

import json
from collections.abc import Iterable
from typing import Any

import msgspec

from common.batches import BatchRecord, new_batch_id

CHAT = "/v1/chat/completions"


def line(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    """A line that asks for a few greedy tokens, unless ``body`` says otherwise."""
    asked: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    if url == CHAT:
        asked |= {"messages": [{"role": "user", "content": f"Say {custom_id}."}]}
    if url == "/v1/completions":
        asked |= {"prompt": f"Say {custom_id}."}
    if url == "/v1/responses":
        asked = {"max_output_tokens": 8, "temperature": 0, "input": f"Say {custom_id}."}
    if url == "/generate":
        asked = {"inputs": f"Say {custom_id}.", "parameters": {"max_new_tokens": 8}}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": asked | body}


def jsonl(lines: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def asking_for(file_id: str, endpoint: str = CHAT, **fields: Any) -> dict[str, Any]:
    """The body of a request for a batch."""
    return {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h"} | fields


def batch_record(**fields: Any) -> BatchRecord:
    """Of tenant ``public`` and the simulated model, not begun yet, unless ``fields`` say so."""
    made = BatchRecord(
        id=new_batch_id(),
        pool="simulated",
        endpoint="/v1/completions",
        input_file_id="file-1",
        created_at=1000,
        expires_at=1000 + 24 * 3600,
    )
    return msgspec.structs.replace(made, **fields)
