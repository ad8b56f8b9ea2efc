"""The chat page and the OpenAI-compatible API over trained models."""
