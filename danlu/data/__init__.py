"""Documents and conversations in: read, normalise, deduplicate, split."""
