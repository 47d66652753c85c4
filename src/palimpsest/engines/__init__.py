"""Engines run a plan."""
