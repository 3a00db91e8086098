"""The doctor: what this machine can run, what is wrong with it, and what to change."""
