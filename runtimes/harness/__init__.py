"""Measurements of a finished bundle: parity with the original model (later: latency and cost)."""
