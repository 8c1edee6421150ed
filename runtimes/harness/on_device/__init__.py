"""Measuring on a device at the end of a cable, and with Core ML's own account of where it runs a model: one file a kind."""
