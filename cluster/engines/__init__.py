"""Engine adapters: a Variant becomes a command line, an environment and a readiness check.

An engine is a process with an OpenAI-compatible HTTP server; nothing outside this package knows
which one runs.
"""
