"""Measuring models: held-out loss, pass@1 on checkable problems, latency."""
