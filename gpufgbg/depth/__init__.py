"""Depth maps: a monocular network over the composites."""
