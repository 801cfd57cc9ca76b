"""The master and the guardian: start, watch, signal and restart every other process.

Reading order: `guardian` starts the master; `master` is its one loop; `child` is a process that
should run, `fleet` has them all, `states` and `policy` say what becomes of one; `imports` and
`reaper` bring and bury its runs; `watch` finds what hangs; `claims` takes what an instance
holds on the host; `logs`, `stacks`, `owners`, `snapshot`, `registry`, `progress`, `notify` and
`control` tell the world.
"""

if __name__ != "streamd.supervisor":
    raise ImportError(f"import this package as streamd.supervisor, not {__name__}")
