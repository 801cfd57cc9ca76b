"""What runs user code: the zygote, the agent processes and the engine of a group."""

if __name__ != "streamd.agentproc":
    raise ImportError(f"import this package as streamd.agentproc, not {__name__}")
