"""SpeedWatch: windows that replicas report, held against the plan. No I/O, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cluster.generations import GenerationKey, key_of
from cluster.messages import ComparedSpeed, ReplicaReport, SpeedStatus
from placement.plan import Variant
from placement.planned_speed import PlannedSpeed
from placement.speed_comparison import WINDOWS, Comparison, Measurement, compare, measured
from placement.speed_window import SpeedWindow, flaw


@dataclass(slots=True)
class _Watched:
    """A variant in one shape: all its replicas together."""

    newest: dict[str, tuple[float, int]] = field(default_factory=dict)  # windows, by replica
    windows: int = 0  # that counted
    last: Comparison | None = None
    pending: deque[Comparison] = field(default_factory=lambda: deque(maxlen=WINDOWS))
    not_counted: str = ""


class SpeedWatch:
    """What was observed of each variant since its engines were started."""

    def __init__(self) -> None:
        self._watched: dict[GenerationKey, _Watched] = {}
        self._changed_s: dict[str, float] = {}  # by model

    def changed(self, model: str, now_s: float) -> None:
        """A replica of the model came, went, or is in another state: streams may move to others."""
        self._changed_s[model] = now_s

    def adopt(self, variants: Collection[Variant]) -> None:
        """Forget what is not of these."""
        keys, models = {key_of(each) for each in variants}, {each.model for each in variants}
        self._watched = {key: each for key, each in self._watched.items() if key in keys}
        self._changed_s = {m: at_s for m, at_s in self._changed_s.items() if m in models}

    def heard(
        self, report: ReplicaReport, variants: Mapping[GenerationKey, Variant], now_s: float
    ) -> tuple[Variant, Measurement] | None:
        """Take a heartbeat in; a measurement, once enough windows of a variant counted."""
        window, key = report.speed, GenerationKey(report.variant, report.version)
        variant = variants.get(key)
        if window is None or variant is None or variant.speed is None:
            return None
        watched = self._watched.setdefault(key, _Watched())
        newest = (report.started_s, window.number)
        if watched.newest.get(report.replica, (0.0, 0)) >= newest:
            return None
        watched.newest[report.replica] = newest
        watched.not_counted = self._flaw(report, variant, window, now_s)
        if watched.not_counted:
            return None
        watched.windows += 1
        watched.last = compare(variant.speed, window)
        watched.pending.append(watched.last)
        if len(watched.pending) < WINDOWS:
            return None
        together = measured(variant.speed, watched.pending)
        watched.pending.clear()
        return variant, together

    def status(self, variant: Variant) -> SpeedStatus | None:
        """For `bora status`."""
        watched = self._watched.get(key_of(variant))
        if watched is None or variant.speed is None:
            return None
        last = watched.last and _compared(variant.speed, watched.last.window)
        return SpeedStatus(windows=watched.windows, last=last, not_counted=watched.not_counted)

    def _flaw(
        self, report: ReplicaReport, variant: Variant, window: SpeedWindow, now_s: float
    ) -> str:
        """Why the window does not count; empty: it does."""
        if variant.role != "whole":
            return f"it does a part of requests' work only ({variant.role})"
        began_s = now_s - window.duration_s
        if report.state != "ready" or began_s < self._changed_s.get(variant.model, began_s):
            return "replicas of the model came or went within the window"
        return flaw(window)


def _compared(planned: PlannedSpeed, window: SpeedWindow) -> ComparedSpeed:
    """As planned now: a new plan may know more than the one that the engines were started by."""
    last, errors = compare(planned, window), planned.costs.efficiency.errors
    return ComparedSpeed(
        concurrency=window.concurrency,
        input_tokens=window.input_tokens,
        output_tokens=window.output_tokens,
        prefix_hit=window.prefix_hit,
        predicted_ttft_s=last.predicted_ttft_s,
        observed_ttft_s=window.ttft_s,
        ttft_error=errors.ttft,
        predicted_tpot_ms=1000 * last.predicted_tpot_s,
        observed_tpot_ms=1000 * window.tpot_s,
        tpot_error=errors.tpot,
    )
