"""What every way to compress a model costs its pictures, side by side: `python -m benchmarks.quality`."""
