"""Serving with the Triton Inference Server: a model repository out of an engine, and what its models run."""
