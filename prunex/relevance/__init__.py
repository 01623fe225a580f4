"""Mathematics that explainers and unit criteria share: row vectors, relevance rules, gradients, tokens at a norm."""
