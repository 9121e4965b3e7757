"""Octavo: an LLM inference engine and server. Rust decides, Python executes."""
