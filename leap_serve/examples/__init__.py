"""Examples that run as they are: ``python -m leap_serve.examples.basic_usage``."""
