"""Prometheus metrics: every counter, gauge and histogram of the service, with the unit in its name.

Labels are few and bounded: never a seed, a class or a client. docs/metrics.md lists all metrics.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Outcome = Literal["ok", "invalid", "rejected", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
QUEUE_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
RATIO_BUCKETS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2, 4)

LOG_LINES_DROPPED = Counter(
    "iddpm_log_lines_dropped_total",
    "Log lines that were not written: queue_full (standard error is read too slowly), write_failed (closed, disk full)",
    ["reason"],
    registry=None,
)
"""Per process, like logging: all services in the process report the same value."""
for _reason in ("queue_full", "write_failed"):
    LOG_LINES_DROPPED.labels(_reason)


class Metrics:
    """The metrics of one service, on a separate registry, so that a process can hold several services."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self.requests = Counter(
            "iddpm_requests_total",
            "Generation requests by outcome: ok, invalid (4xx), rejected (429, 503), failed (5xx), cancelled",
            ["outcome"],
            registry=registry,
        )
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.images = Counter("iddpm_images_total", "Images delivered", registry=registry)
        self.request_seconds = Histogram(
            "iddpm_request_duration_seconds",
            "From a request's arrival to the end of its response, for requests with outcome ok",
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "iddpm_image_queue_seconds",
            "From an image's admission to its first network call",
            buckets=QUEUE_BUCKETS,
            registry=registry,
        )
        self.compute_seconds = Histogram(
            "iddpm_image_compute_seconds",
            "From an image's first network call to its last",
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.encode_seconds = Histogram(
            "iddpm_encode_seconds",
            "Encoding of an answer, including the wait for a thread; in OpenAI's streams of each image",
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self.model_images = Counter(
            "iddpm_model_images_total",
            "Finished images by model and outcome: done, failed",
            ["model", "outcome"],
            registry=registry,
        )
        self.model_image_seconds = Counter(
            "iddpm_model_image_seconds_total",
            "Seconds spent on images that are done, by model and phase: queue, compute",
            ["model", "phase"],
            registry=registry,
        )
        self.model_last_image = Gauge(
            "iddpm_model_last_image_timestamp_seconds",
            "Time when the last image of a model was done, in seconds since 1970",
            ["model"],
            registry=registry,
        )
        self.images_waiting = Gauge("iddpm_images_waiting", "Queue depth: images not yet started", registry=registry)
        self.images_running = Gauge("iddpm_images_running", "Images that hold a slot", registry=registry)
        self.images_evicted = Gauge(
            "iddpm_images_evicted", "Started images whose state is in host memory", registry=registry
        )
        self.preemptions = Counter(
            "iddpm_preemptions_total",
            "Started images that were not picked for a step",
            registry=registry,
        )
        self.evictions = Counter(
            "iddpm_evictions_total", "Images whose state was copied to host memory to free a slot", registry=registry
        )
        self.deadline_misses = Counter(
            "iddpm_deadline_misses_total", "Images delivered after their deadline", registry=registry
        )
        self.predicted_wait_seconds = Histogram(
            "iddpm_predicted_wait_seconds",
            "Time until a request's first network call, predicted on admission",
            buckets=QUEUE_BUCKETS,
            registry=registry,
        )
        self.finish_over_predicted = Histogram(
            "iddpm_finish_over_predicted_ratio",
            "Time from a request's admission to its last image, divided by the time predicted on admission",
            buckets=RATIO_BUCKETS,
            registry=registry,
        )
        self.network_calls = Counter("iddpm_network_calls_total", "Network calls", ["model"], registry=registry)
        self.classifier_calls = Counter(
            "iddpm_classifier_calls_total", "Calls of a model's noisy classifier", ["model"], registry=registry
        )
        self.classified_rows = Counter(
            "iddpm_classified_rows_total",
            "Rows of classifier calls: one per image with classifier guidance; padding not counted",
            ["model"],
            registry=registry,
        )
        self.rows_per_call = Histogram(
            "iddpm_rows_per_network_call",
            "Rows of a network call: one per image, two with classifier-free guidance; padding not counted",
            buckets=ROW_BUCKETS,
            registry=registry,
        )
        self.failed_attempts = Counter(
            "iddpm_failed_attempts_total",
            "Attempts at an engine step that raised and were repeated in two halves, by kind: error, out_of_memory",
            ["kind"],
            registry=registry,
        )
        self.images_failed = Counter(
            "iddpm_images_failed_total",
            "Images that failed without affecting others, by reason: not_finite, error, out_of_memory",
            ["reason"],
            registry=registry,
        )
        self.padded_rows = Counter("iddpm_padded_rows_total", "Rows computed for padding only", registry=registry)
        self.uncaptured_steps = Counter(
            "iddpm_uncaptured_steps_total",
            "Attempts at an engine step of a batch size without a captured graph, on a device that supports graphs",
            ["model"],
            registry=registry,
        )
        self.row_steps = Counter("iddpm_row_steps_total", "Rows advanced by one sampling step", registry=registry)
        self.wasted_row_steps = Counter(
            "iddpm_wasted_row_steps_total",
            "Row-steps computed for images that were cancelled or failed",
            registry=registry,
        )
        self.remaining_row_steps = Gauge(
            "iddpm_remaining_row_steps", "Remaining row-steps of all requests in flight", registry=registry
        )
        self.width_rows = Gauge("iddpm_width_rows", "Chosen limit of rows per step", ["model"], registry=registry)
        self.step_seconds = Histogram(
            "iddpm_engine_step_seconds",
            "Duration of an engine step (schedule, gather, network call, update), by padded rows",
            ["model", "padded_rows"],
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self.loop_lag_seconds = Histogram(
            "iddpm_event_loop_lag_seconds",
            "Delay of the event loop's timers, measured ten times a second",
            buckets=LAG_BUCKETS,
            registry=registry,
        )
        self.log_lines_dropped = LOG_LINES_DROPPED
        registry.register(LOG_LINES_DROPPED)
        self.ready = Gauge("iddpm_ready", "1 while /readyz reports ready", registry=registry)
        self.model_info = Gauge(
            "iddpm_model_info",
            "1 for each served model; its numerics_id determines pixels",
            ["model", "numerics_id", "backend"],
            registry=registry,
        )

    def set_models(self, models: Iterable[tuple[str, str, str]]) -> None:
        """Report exactly these served models: name, numerics_id and backend of each."""
        self.model_info.clear()
        for labels in models:
            self.model_info.labels(*labels).set(1)

    def image_done(self, model: str, queue_s: float, compute_s: float) -> None:
        """Count an image that is done, and its seconds in the queue and in computation."""
        self.queue_seconds.observe(queue_s)
        self.compute_seconds.observe(compute_s)
        self.model_images.labels(model, "done").inc()
        self.model_image_seconds.labels(model, "queue").inc(queue_s)
        self.model_image_seconds.labels(model, "compute").inc(compute_s)
        self.model_last_image.labels(model).set_to_current_time()
