"""OpenAI's API: its routes, what clients send, and its way to what the engine takes."""
