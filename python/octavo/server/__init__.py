"""The HTTP server: OpenAI's API over an `AsyncEngine`. Imports no torch."""
