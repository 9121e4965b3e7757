"""Modules that are started with `python -m`, under the names vLLM uses."""
