"""Bundled reference pipelines: a world of captioned scenes, its judge, and models trained on it."""

from slimdiff.reference.bundled import REFERENCES, bundled_path, load_reference

__all__ = ["REFERENCES", "bundled_path", "load_reference"]
