"""Code: problems and their tests, run in the sandbox (`core.sandbox`), and what that says of a model."""
