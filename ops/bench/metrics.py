"""What a gateway on this machine says at ``/metrics``."""

import urllib.request

_ANSWER_TIMEOUT_S = 30.0


def metrics_at(port: int) -> str:
    """All of it, in Prometheus' text format."""
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=_ANSWER_TIMEOUT_S) as answer:
        return answer.read().decode()


def buckets_in(text: str, name: str) -> dict[float, float]:
    """The histogram ``name``: by upper edge, how often it was not exceeded."""
    return {
        float(line.partition('le="')[2].partition('"')[0]): float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith(f"{name}_bucket")
    }
