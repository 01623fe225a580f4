"""The report: a page about one run."""
