"""``leap serve``: vLLM's server with our routes on it, specialists in its slots, and the whole as a child process."""
