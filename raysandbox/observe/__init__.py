"""Seeing what runs in the sandbox: live state, events, figures, and the cluster."""
