"""Optimisers, schedules and the one training loop."""
