"""Measuring what MEAP is for: retrieval, long context, attention."""
