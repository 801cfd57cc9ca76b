"""The command line, and what an app's own commands are declared with."""

from streamd.cli.options import argument, option
from streamd.cli.root import main

__all__ = ["argument", "main", "option"]
