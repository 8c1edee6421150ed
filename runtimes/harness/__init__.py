"""Measurements of a finished bundle: parity with the original model, latency, and what an image costs."""
