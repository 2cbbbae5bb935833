"""A run: its config, its state, what it saves and what it records."""
