"""Anthropic's API: its routes, what clients send, its errors."""
