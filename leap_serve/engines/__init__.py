"""Who runs a model behind the engine protocol: vLLM, which serves, and transformers, the reference."""
