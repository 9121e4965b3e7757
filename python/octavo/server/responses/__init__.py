"""OpenAI's responses: their routes, what clients send, its way to a chat."""
