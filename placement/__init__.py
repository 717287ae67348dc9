"""Decide which model runs in which shape on which GPUs: pure functions from values to values."""
