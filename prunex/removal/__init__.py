"""Games of leaving patches out, which explainers and metrics play."""
