"""What a process shows at ``/metrics``, read as Prometheus reads it."""

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
    return Figures(list(text_string_to_metric_families(text)))
