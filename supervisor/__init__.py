"""The master and the guardian: start, watch, signal and restart every other process."""

if __name__ != "streamd.supervisor":
    raise ImportError(f"import this package as streamd.supervisor, not {__name__}")
