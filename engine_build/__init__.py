"""Offline: a checkpoint becomes an engine directory (spec, weights, graph, tokenizer, manifest)."""
