"""What the command line imports: a start waits for it."""

import subprocess
import sys


def test_a_start_imports_no_asyncio() -> None:
    source = "import sys, streamd.cli.launch; print('asyncio' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", source], capture_output=True, timeout=60)

    assert done.stdout == b"False\n", done.stderr
