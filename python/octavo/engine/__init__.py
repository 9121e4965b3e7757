"""Model execution: step buffers, the model runner, the engine loop and the ways in from Python."""
