"""The sandbox: programs that nobody vouches for run here, and nowhere else.

`Jail` in `host.py` is what the rest of danlu uses; docs/sandbox.md says what holds a program in.
"""
