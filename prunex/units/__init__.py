"""One criterion for heads and MLP channels a file, and what they share."""
