"""What tests and benchmarks share: the decoder as a process, and random policies for it."""

PATIENCE = 300.0
"""Seconds after which a test gives up waiting: no bound on how long anything takes, an idle machine needs no tenth of it."""
