"""The embedded default model: its weights, its card and the script that rebuilds it."""
