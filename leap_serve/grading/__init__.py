"""How one answer is graded: metrics as their authors define them, degeneration, and code run in a sandbox."""
