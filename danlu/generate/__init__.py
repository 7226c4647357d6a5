"""Sampling and the engine that every token comes from."""
