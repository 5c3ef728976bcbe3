"""What ``text-generation``, TGI's own client, gets from a server: JSON on standard output.

Without streamed chats, which fail against TGI as well: its type of a chunk demands ``tool_calls``,
which TGI leaves out of all but calls, and it reads the ``[DONE]`` that ends a stream as JSON. To
leave that out would break every other client.
"""

import asyncio
import json
import sys

from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError


def synchronous(url: str) -> dict[str, object]:
    client = Client(url, timeout=60)
    whole = client.generate("hello", max_new_tokens=8, seed=7, do_sample=True, top_n_tokens=2)
    stream = list(client.generate_stream("hello", max_new_tokens=8, seed=7, do_sample=True))
    try:
        client.generate("hello", max_new_tokens=8, temperature=-1)
        refusal = ""
    except ValidationError as error:
        refusal = str(error)
    chat = client.chat([{"role": "user", "content": "hello"}], max_tokens=8, seed=7)
    return {
        "text": whole.generated_text,
        "tokens": whole.details.generated_tokens,
        "reason": whole.details.finish_reason.value,
        "tops": len(whole.details.top_tokens),
        "streamed": stream[-1].generated_text,
        "pieces": "".join(event.token.text for event in stream if not event.token.special),
        "refusal": refusal,
        "chat": chat.choices[0].message.content,
    }


async def asynchronous(url: str) -> dict[str, object]:
    client = AsyncClient(url, timeout=60)
    whole = await client.generate("hello", max_new_tokens=8, seed=7, do_sample=True)
    stream = client.generate_stream("hello", max_new_tokens=8, seed=7, do_sample=True)
    events = [event async for event in stream]
    chat = await client.chat([{"role": "user", "content": "hello"}], max_tokens=8, seed=7)
    return {
        "text": whole.generated_text,
        "streamed": events[-1].generated_text,
        "chat": chat.choices[0].message.content,
    }


if __name__ == "__main__":
    url = sys.argv[1]
    print(json.dumps([synchronous(url), asyncio.run(asynchronous(url))]))  # noqa: T201
