"""A router before engines: one OpenAI-compatible address for all of them."""
