"""What attach gives back: the handle on a pruned model."""
