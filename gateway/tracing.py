"""A span per request, exported only if OTEL_EXPORTER_OTLP_ENDPOINT is set; else nothing is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from gateway.call import Call, header_lines
from gateway.record import Record

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span


class Tracing:
    """Continues the client's trace, and tells the engine about it through `traceparent`."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("bora.gateway") if provider else None

    @property
    def enabled(self) -> bool:
        """Spans are exported. While they are not, the client's headers go on untouched."""
        return self._tracer is not None

    def start(self, call: Call) -> Span | None:
        """A span for one request, which the engine's will be children of."""
        if self._tracer is None:
            return None
        from opentelemetry.trace import SpanKind, set_span_in_context  # noqa: PLC0415 - paid when used
        from opentelemetry.trace.propagation import tracecontext  # noqa: PLC0415

        propagator = tracecontext.TraceContextTextMapPropagator()
        span = self._tracer.start_span(
            f"{call.api} {call.path}",
            context=propagator.extract(call.headers),
            kind=SpanKind.SERVER,
        )
        headers = dict(call.headers)
        propagator.inject(headers, context=set_span_in_context(span))
        call.headers, call.lines = headers, header_lines(headers)
        return span

    def step(self, span: Span, name: str, call: Call) -> tuple[Span, Call]:
        """A part of what `span` is of, and `call` for the engine that does it, whose span is below."""
        from opentelemetry.trace import SpanKind, set_span_in_context  # noqa: PLC0415 - paid when used
        from opentelemetry.trace.propagation import tracecontext  # noqa: PLC0415

        if self._tracer is None:
            return span, call
        within = set_span_in_context(span)
        step = self._tracer.start_span(name, context=within, kind=SpanKind.CLIENT)
        headers = dict(call.headers)
        propagator = tracecontext.TraceContextTextMapPropagator()
        propagator.inject(headers, context=set_span_in_context(step))
        return step, replace(call, headers=headers, lines=header_lines(headers))

    def finish(self, span: Span, record: Record) -> None:
        """The request is over."""
        from opentelemetry.trace import StatusCode  # noqa: PLC0415 - paid when used

        _describe(span, record)
        if record.status >= 500:
            span.set_status(StatusCode.ERROR, record.error or None)
        span.end()

    def close(self) -> None:
        """Export what is left. Blocks for as long as that takes."""
        if self._provider:
            self._provider.shutdown()


def tracing_from(environment: Mapping[str, str]) -> Tracing:
    """Tracing as the usual OTEL_* variables ask for it; off without an endpoint."""
    if not environment.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return Tracing()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    name = environment.get("OTEL_SERVICE_NAME", "bora-gateway")
    provider = TracerProvider(
        resource=Resource.create({"service.name": name}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


def _describe(span: Span, record: Record) -> None:
    span.set_attribute("gen_ai.request.model", record.model)
    span.set_attribute("bora.variant", record.variant)
    span.set_attribute("bora.endpoint", record.endpoint)
    span.set_attribute("bora.request_id", record.request_id)
    span.set_attribute("bora.attempts", record.attempts)
    span.set_attribute("http.response.status_code", record.status)
    if record.ttft_s is not None:
        span.set_attribute("gen_ai.server.time_to_first_token", record.ttft_s)
    if record.usage:
        span.set_attribute("gen_ai.usage.input_tokens", record.usage.prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", record.usage.completion_tokens)
