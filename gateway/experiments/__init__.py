"""Experiments as data: what a file of stages asks for, where each stage's folder lies, what it came to, and what it costs.

Nothing is run here: gateway.cli.experiment does that.
"""
