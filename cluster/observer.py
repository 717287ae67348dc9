"""Observer: keeps what engines needed and did where the next plan reads it, and tells surprises."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.calibration_file import update_calibration
from cluster.event_log import EventLog
from cluster.generations import GenerationKey, key_of
from cluster.messages import ReplicaReport, SpeedStatus
from cluster.speed_watch import SpeedWatch
from placement.calibration import Calibration
from placement.errors import ConfigError
from placement.observation import observe
from placement.plan import Variant
from placement.speed_comparison import Measurement, surprises

log = logging.getLogger("bora.controller")


class Observer:
    """Of the fleet that `adopt` was told last. `path` is the calibration file."""

    def __init__(self, path: Path, events: EventLog) -> None:
        self._path = path
        self._events = events
        self._watch = SpeedWatch()
        self._variants: dict[GenerationKey, Variant] = {}
        self._surprised: dict[GenerationKey, bool] = {}
        self._writing = asyncio.Lock()

    def adopt(self, variants: Sequence[Variant]) -> None:
        """What is planned from now on."""
        self._variants = {key_of(variant): variant for variant in variants}
        self._surprised = {k: told for k, told in self._surprised.items() if k in self._variants}
        self._watch.adopt(variants)

    def changed(self, model: str) -> None:
        """A replica of the model is new, gone, or in another state."""
        self._watch.changed(model, time.monotonic())

    def speed(self, variant: Variant) -> SpeedStatus | None:
        """Predicted and observed."""
        return self._watch.status(variant)

    async def ready(self, report: ReplicaReport) -> None:
        """An engine has started and told its memory."""
        variant = self._variants.get(GenerationKey(report.variant, report.version))
        if variant is None:
            return
        observation = observe(
            variant,
            weights_bytes=report.weights_bytes,
            kv_cache_tokens=report.kv_cache_tokens,
            observed=_today(),
        )
        if observation is None:
            return
        log.warning("the plan was %.0f %% off: %s", 100 * observation.error, observation)
        text = f"the memory plan was {100 * observation.error:.0f} % off"
        self._note(variant, text, str(observation))
        await self._keep(lambda known: known.with_observation(observation))

    async def heard(self, report: ReplicaReport) -> None:
        """A heartbeat, which may tell of a window."""
        news = self._watch.heard(report, self._variants, time.monotonic())
        if news is None:
            return
        variant, measurement = news
        if variant.speed is None or variant.speed.setup.engine == "sim":
            return  # how fast a simulation is says nothing of engines
        self._tell(variant, measurement)
        setup = variant.speed.setup
        await self._keep(
            lambda known: known.with_measured(
                setup,
                model=variant.catalogue_model,
                observed=_today(),
                ttft=measurement.ttft_ratio,
                tpot=measurement.tpot_ratio,
            )
        )

    def _tell(self, variant: Variant, measurement: Measurement) -> None:
        """An event for the first measurement that is off, and again once one was not."""
        assert variant.speed is not None  # noqa: S101 - it was compared with
        key, told = key_of(variant), surprises(variant.speed, measurement)
        if told and not self._surprised.get(key):
            self._note(variant, f"{variant.variant}: {'; '.join(told)}", str(measurement))
        self._surprised[key] = bool(told)

    async def _keep(self, change: Callable[[Calibration], Calibration]) -> None:
        """One change at a time, beside the event loop: a long file takes a second."""
        async with self._writing:
            try:
                await asyncio.to_thread(update_calibration, self._path, change)
            except (OSError, ConfigError):
                log.exception("what was measured could not be kept")

    def _note(self, variant: Variant, text: str, reason: str) -> None:
        self._events.note(time.time(), "calibration", text, model=variant.model, reason=reason)


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())
