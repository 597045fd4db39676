"""OTLP: spans and metrics to any OpenTelemetry back end."""
