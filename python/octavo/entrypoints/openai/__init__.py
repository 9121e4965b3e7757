"""OpenAI-compatible entry points."""
