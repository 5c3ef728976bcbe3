"""What ``langchain-huggingface`` gets from a server: JSON on standard output."""

import json
import sys

from langchain_huggingface import HuggingFaceEndpoint


def answers(url: str) -> dict[str, object]:
    model = HuggingFaceEndpoint(
        endpoint_url=url,
        max_new_tokens=8,
        do_sample=True,
        temperature=0.8,
        seed=7,
        huggingfacehub_api_token="unused",
    )
    return {"text": model.invoke("hello"), "streamed": "".join(model.stream("hello"))}


if __name__ == "__main__":
    print(json.dumps(answers(sys.argv[1])))  # noqa: T201
