"""Serving a GlimpsePrune model by transformers' own OpenAI-compatible server."""
