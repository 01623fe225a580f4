"""Explainers that are trained, as modules that are saved and read again."""
