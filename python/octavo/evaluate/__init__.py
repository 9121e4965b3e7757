"""`octavo evaluate`: what a model, its weights' form and its KV cache's form cost in quality."""
