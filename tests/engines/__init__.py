"""Tests with real engines, each in an environment of its own: `make test-engines`."""
