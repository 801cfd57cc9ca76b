"""The gateway: the only HTTP of an instance; pages, table look-ups, stats."""

if __name__ != "streamd.webgw":
    raise ImportError(f"import this package as streamd.webgw, not {__name__}")
