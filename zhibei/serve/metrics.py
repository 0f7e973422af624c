"""Counts and times of a server in the text format of Prometheus. Knows no server.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
Labels = tuple[tuple[str, str], ...]

_COUNTERS = {
    "zhibei_requests_total": "Requests that got a response, by path and status.",
    "zhibei_prompt_tokens_total": "Prompt tokens of finished answers.",
    "zhibei_answer_tokens_total": "Tokens of finished answers.",
    "zhibei_answers_cancelled_total": "Answers given up because the client left or time was up.",
}
_TIMES = {
    "zhibei_request_seconds": "Seconds from the request to the end of its response.",
    "zhibei_first_piece_seconds": "Seconds from a request for a stream to the first text of its answer.",
}


@dataclass
class _Times:
    num_by_bucket: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total_seconds: float = 0.0


class Metrics:
    """Counts from the start of the server. Any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, Labels], float] = {}
        self._times: dict[tuple[str, Labels], _Times] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Raise a counter of `_COUNTERS`."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + value

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Note how long something took."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            times = self._times.setdefault(key, _Times())
            times.num_by_bucket[sum(seconds > border for border in SECONDS)] += 1
            times.total_seconds += seconds

    def text(self, gauges: Mapping[str, tuple[str, Mapping[str, float]]]) -> str:
        """The whole document; `gauges` are values of this moment: {name: (help, {model: value})}."""
        lines: list[str] = []
        with self._lock:
            for name, about in _COUNTERS.items():
                lines += _head(name, about, "counter")
                lines += [f"{name}{_braces(key[1])} {value:g}" for key, value in self._counts.items() if key[0] == name]
            for name, about in _TIMES.items():
                lines += _head(name, about, "histogram")
                for key, times in self._times.items():
                    if key[0] == name:
                        lines += _histogram(name, key[1], times)
        for name, (about, values) in gauges.items():
            lines += _head(name, about, "gauge")
            lines += [f"{name}{_braces((('model', model),))} {value:g}" for model, value in values.items()]
        return "\n".join(lines) + "\n"


def _head(name: str, about: str, kind: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]


def _histogram(name: str, labels: Labels, times: _Times) -> list[str]:
    lines, so_far = [], 0
    for border, count in zip((*map(str, SECONDS), "+Inf"), times.num_by_bucket, strict=True):
        so_far += count
        lines.append(f"{name}_bucket{_braces((*labels, ('le', border)))} {so_far}")
    lines.append(f"{name}_sum{_braces(labels)} {times.total_seconds:.6f}")
    lines.append(f"{name}_count{_braces(labels)} {so_far}")
    return lines


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
