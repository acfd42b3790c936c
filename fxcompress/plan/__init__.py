"""Plans: a checked policy bound to a captured graph, dry-run on fake tensors."""
