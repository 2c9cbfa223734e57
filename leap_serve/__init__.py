"""leap-serve: find the experts a task needs, cut them out, serve them with vLLM."""

__version__ = "0.1.0"
