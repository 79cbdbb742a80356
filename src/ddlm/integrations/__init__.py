"""Bridges to other libraries: transformers' Auto classes, and model folders and the hub."""
