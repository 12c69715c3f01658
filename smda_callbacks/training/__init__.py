"""Watching a Hugging Face or TRL trainer: when to measure, what to book, how to start and end a run."""
