"""Autoscaler: what gateways report, remembered, so that `placement.scaling` can decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.endpoints import ModelLoad
from placement import scaling
from placement.errors import ConfigError
from placement.plan import Variant

GATEWAY_TIMEOUT_S = 5.0
_IDLE = ModelLoad(in_flight=0.0, queued=0, requests_total=0)


class Autoscaler:
    """Targets per variant. Holds no clock: the time is an argument."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, Mapping[str, ModelLoad]]] = {}
        self._targets: dict[str, int] = {}
        self._states: dict[str, scaling.ScalingState] = {}

    def observe(self, gateway: str, loads: Mapping[str, ModelLoad], now_s: float) -> None:
        """Take in what one gateway saw since its last report."""
        self._reports[gateway] = (now_s, loads)

    def gateways(self, now_s: float) -> tuple[str, ...]:
        """Those that reported lately; the others are forgotten."""
        for name, (heard_s, _) in list(self._reports.items()):
            if now_s - heard_s > GATEWAY_TIMEOUT_S:
                del self._reports[name]
        return tuple(sorted(self._reports))

    def load(self, *models: str) -> ModelLoad:
        """Of a model (with its adapters, which it serves too), summed over gateways."""
        reports = [loads for _, loads in self._reports.values()]
        loads = [each.get(model, _IDLE) for each in reports for model in models]
        return ModelLoad(
            in_flight=sum(load.in_flight for load in loads),
            queued=sum(load.queued for load in loads),
            requests_total=sum(load.requests_total for load in loads),
        )

    def adopt(self, variant: Variant, *, running: bool) -> int:
        """Replicas to give `variant` now: what it has if it runs, within its bounds."""
        before = self._targets.get(variant.variant) if running else None
        wanted = variant.replicas if before is None else before
        self._targets[variant.variant] = min(max(wanted, variant.bounds.min), variant.bounds.max)
        return self._targets[variant.variant]

    def restore(self, targets: Mapping[str, int]) -> None:
        """Start from replica counts that were decided before a restart."""
        self._targets.update(targets)

    def target(self, variant: Variant) -> int:
        """Replicas that `variant` should have."""
        return self._targets.get(variant.variant, variant.replicas)

    def set(self, variant: Variant, replicas: int) -> None:
        """An operator's wish; it holds until the load asks for another count."""
        self._targets[variant.variant] = replicas
        self._states.pop(variant.variant, None)

    def decide(
        self, variant: Variant, ready: int, now_s: float, siblings: Sequence[Variant] = ()
    ) -> scaling.Decision | None:
        """The new target if it differs from the current one.

        `siblings` are all variants of the model: each that answers takes its share of the load,
        and those that only read prompts follow.
        """
        if not self.gateways(now_s):
            return None  # nobody tells about the load: leave everything as it is
        if variant.role == "prefill":
            return self.follow(variant, siblings)
        load = self.load(variant.model, *variant.adapters)
        share = self._share(variant, answering(siblings) or (variant,))
        decision, self._states[variant.variant] = scaling.decide(
            self._states.get(variant.variant, scaling.ScalingState()),
            scaling.Load(in_flight=load.in_flight * share, queued=load.queued * share),
            variant.scaling,
            variant.bounds,
            slots_per_replica=variant.shape.request_slots,
            current_replicas=self.target(variant),
            ready_replicas=ready,
            now_s=now_s,
        )
        return None if decision.target == self.target(variant) else decision

    def follow(self, variant: Variant, siblings: Sequence[Variant]) -> scaling.Decision | None:
        """As `decide`, of a variant that only reads prompts, from its siblings that decode."""
        others = [each for each in siblings if each.role == "decode"]
        replicas = sum(self.target(each) for each in others)
        target = scaling.beside(
            replicas,
            planned_decoding=sum(each.replicas for each in others),
            planned=variant.replicas,
            bounds=variant.bounds,
        )
        if target == self.target(variant):
            return None
        return scaling.Decision(target, f"beside {replicas} decode replicas")

    def _share(self, variant: Variant, siblings: Sequence[Variant]) -> float:
        """Of the model's load: by routing weights (of a canary), else by slots.

        A variant without replicas counts as one, so that it may come back.
        """
        weights = {each.variant: variant.routing.weights.get(each.variant, 0) for each in siblings}
        if total := sum(weights.values()):
            return weights[variant.variant] / total
        slots = {
            each.variant: max(1, self.target(each)) * each.shape.request_slots for each in siblings
        }
        return slots[variant.variant] / sum(slots.values())


def answering(variants: Sequence[Variant]) -> list[Variant]:
    """Those that answer requests; the others only read prompts."""
    return [variant for variant in variants if variant.role != "prefill"]


def shared_out(variants: Sequence[Variant], replicas: int) -> list[tuple[Variant, int]]:
    """How many of so many replicas each variant of a model gets; its first variant first.

    Raises:
        ConfigError: so many, or so few, are outside of the bounds of all together.
    """
    least = sum(variant.bounds.min for variant in variants)
    most = sum(variant.bounds.max for variant in variants)
    if not least <= replicas <= most:
        raise ConfigError(
            f"{variants[0].model}: {replicas} replicas are outside of {least}..{most}, which "
            f"the fleet allows; change `replicas` there and deploy it"
        )
    left, found = replicas - least, []
    for variant in variants:
        more = min(left, variant.bounds.max - variant.bounds.min)
        found.append((variant, variant.bounds.min + more))
        left -= more
    return found
