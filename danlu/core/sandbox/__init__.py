"""The sandbox: programs that nobody vouches for run here, and nowhere else.

`Sandbox` is what the rest of danlu uses; docs/sandbox.md says what holds a program in, layer by layer.
"""
