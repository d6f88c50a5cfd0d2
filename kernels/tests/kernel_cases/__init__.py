"""What several of the kernels' tests use: inputs, comparisons, and models that take the head."""
