"""Bundled reference pipelines: worlds of captioned pictures, their judges, and models of them."""

from slimdiff.reference.bundled import REFERENCES, bundled_path, load_reference

__all__ = ["REFERENCES", "bundled_path", "load_reference"]
