"""oppu-ray: One PEFT Per User (arXiv 2402.04401) as a distributed system."""

__version__ = "0.1.0"
