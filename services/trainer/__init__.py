"""Keeps the decisions, moves jobs through their states, trains in a child process and publishes policy sets."""
