"""Repositories as files: safetensors headers, complete-or-nothing writing, inspection."""
