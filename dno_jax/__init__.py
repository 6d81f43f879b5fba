"""Direct Nash Optimization (arXiv 2404.03715) in JAX."""

__version__ = "0.1.0"
