"""The version, which files that prunex writes carry."""

__version__ = "0.1.0"
