"""Pictures in, annotated pictures and result files out."""
