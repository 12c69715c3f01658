"""Ways for the callback to reach a trainer whose script is not edited: environment, wrapper, plugin."""
