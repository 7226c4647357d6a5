"""The transformer, its weights in and out, and what it costs."""
