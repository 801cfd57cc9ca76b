"""Stream processing in Python, run by a supervised fleet of processes."""

__version__ = "0.1.0"
