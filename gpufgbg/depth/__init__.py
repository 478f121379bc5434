"""Depth maps: a monocular network over the composites."""

__all__: list[str] = []
