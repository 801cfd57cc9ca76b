"""The master as the guardian starts it.

python -m streamd.supervisor SPEC_FD LOCK_FD READY_FD
"""

import sys

# The master speaks no TLS, packs no files, and needs no types that are newer than its Python:
# asyncio, shutil and msgspec do without. Together they are a fifth of the master's memory.
for name in ("ssl", "typing_extensions", "bz2", "lzma", "zlib"):
    sys.modules[name] = None  # type: ignore[assignment]

from streamd.supervisor.begin import main  # noqa: E402

if __name__ == "__main__":
    main()
