"""Triggers: what starts a capture by itself, within limits."""
