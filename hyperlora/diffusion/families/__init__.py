"""One adapter per family of diffusion pipelines; ``registry`` finds the one of a pipeline."""
