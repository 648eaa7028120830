"""The pages at /metrics of several servers as one, each sample under its server's label. Knows no Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "replica"


class _Pages(Collector):
    def __init__(self, pages: Mapping[str, str]) -> None:
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for name, page in self._pages.items():
            for family in text_string_to_metric_families(page):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [
                    sample._replace(labels={**sample.labels, LABEL: name}) for sample in family.samples
                ]
        yield from families.values()


def joined(pages: Mapping[str, str]) -> bytes:
    """One page of them all, in Prometheus' text format; `pages` by the label's value."""
    registry = CollectorRegistry()
    registry.register(_Pages(pages))
    return generate_latest(registry)
