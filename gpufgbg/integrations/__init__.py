"""The stream inside other people's frameworks: PyTorch, JAX, DALI, Ray. Each needs its framework, and says so."""

from __future__ import annotations

__all__: list[str] = []
