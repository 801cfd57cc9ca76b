"""`streamd demo`: the word count that ships with streamd, and what shows it at work."""

from streamd.demo.show import run as run
