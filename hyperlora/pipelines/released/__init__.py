"""Networks that others released, read from their own files: kind, facts, models."""
