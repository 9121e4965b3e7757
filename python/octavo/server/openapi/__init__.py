"""The OpenAPI document of all routes, made of the structs that check requests, and a page of it."""
