"""Alignment: from preferences and rewards to a model that behaves."""
