"""Waits separated from work: what a stage waited for, and who held it."""
