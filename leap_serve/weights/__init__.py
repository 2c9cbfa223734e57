"""The bytes of a checkpoint: safetensors files, shards, and what tuning lays beside them, read and merged in."""
