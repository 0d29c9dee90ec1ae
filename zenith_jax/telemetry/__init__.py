"""What Zenith did while compiling, and how long calls take.

    zenith.telemetry.records()               the latest compilations, each a frozen Record
    zenith.telemetry.listen(function)        function(record), called at each; returns what ends that
    zenith.telemetry.latencies()             sampled calls, where ZENITH_TELEMETRY=N or configure(telemetry=N) asked
    zenith.telemetry.to_opentelemetry()      both, to the meter and tracer that the application has set up

docs/telemetry.md says what each number is.
"""

from zenith_jax.telemetry.compiling import clear, listen, records
from zenith_jax.telemetry.histogram import Histogram
from zenith_jax.telemetry.otel import to_opentelemetry
from zenith_jax.telemetry.record import SCHEMA, Record
from zenith_jax.telemetry.sampling import Latency, Sample, latencies, listen_to_samples

__all__ = [
    "SCHEMA",
    "Histogram",
    "Latency",
    "Record",
    "Sample",
    "clear",
    "latencies",
    "listen",
    "listen_to_samples",
    "records",
    "to_opentelemetry",
]
