"""What a process shows at ``/metrics``, read as Prometheus reads it."""

import re
import subprocess
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


@dataclass(frozen=True)
class Figures:
    families: list[Metric]

    @property
    def samples(self) -> list[Sample]:
        return [sample for family in self.families for sample in family.samples]

    def get(self, name: str, **labels: str) -> float | None:
        """Of the series with that name and at least these labels; None: there is none.

        Raises: AssertionError, when there are several.
        """
        found = [
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) < 2, f"several series of {name} with {labels}"
        return found[0] if found else None

    def total(self, name: str, **labels: str) -> float:
        """The sum of all such series."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def names(self) -> set[str]:
        return {sample.name for sample in self.samples}


def figures_in(text: str) -> Figures:
    """Under the names that there are: the parser would have every counter end in ``_total``."""
    untyped = re.sub(r"(?m)^(# TYPE \S+) counter$", r"\1 untyped", text)
    return Figures(list(text_string_to_metric_families(untyped)))


def complaints(text: str) -> list[str]:
    """What ``promtool check metrics`` says of a text, less what it says of names of peers: these
    are as their dashboards ask for them. What it says of peers' figures otherwise is told, too.
    """
    ended = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    said = (ended.stdout + ended.stderr).splitlines()
    assert ended.returncode in (0, _LINTED), "\n".join(said)
    return [line for line in said if line and not _PEERS_NAME.fullmatch(line)]


_LINTED = 3
"""promtool's exit code where it only complains of style."""
_PEERS_NAME = re.compile(
    r"vllm:\w+ metric names should not contain ':'"
    r'|vllm:iteration_tokens_total non-counter metrics should not have "_total" suffix'
    r'|tgi_\w+ counter metrics should have "_total" suffix'
    r'|tgi_\w+ non-histogram and non-summary metrics should not have "_count" suffix'
    r"|DCGM_\w+ (metric|label) names should be written in 'snake_case' not 'camelCase'"
)
