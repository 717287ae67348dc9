"""Nano models: real checkpoints of Mistral's architectures, small enough for two CPU cores.

The weights are random, drawn from a fixed seed: the same bytes everywhere. What they say is
noise, but everything around it (tokenizer, chat template, experts, latent attention, vision
tower) is the real thing, so an engine serves them exactly as it serves their big siblings.
"""

from __future__ import annotations

from cluster.nano.recipes import NAMES
from cluster.nano.store import ensure, ensure_gguf

__all__ = ["NAMES", "ensure", "ensure_gguf"]
