"""Ready-made runs: one YAML per run, read through importlib.resources."""
