"""Tasks: where items come from and how completions are scored."""
