"""The master as the guardian starts it.

python -m streamd.supervisor SPEC_FD LOCK_FD READY_FD
"""

import sys

# The master speaks no TLS, and needs no types that are newer than its Python: asyncio and
# msgspec do without. Together they are a fifth of the master's memory.
for name in ("ssl", "typing_extensions"):
    sys.modules[name] = None  # type: ignore[assignment]

from streamd.supervisor.begin import main  # noqa: E402

if __name__ == "__main__":
    main()
