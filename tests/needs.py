"""Marks of tests that need what isn't everywhere."""

import os

import pytest

needs_data = pytest.mark.skipif("DANLU_DATA" not in os.environ, reason="DANLU_DATA is not set")
