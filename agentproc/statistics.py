"""What an engine counts, for the master and the stats page."""

from collections import defaultdict

from streamd.agentproc.broker import Checkpoint


class Statistics:
    """What an engine counts."""

    def __init__(self) -> None:
        self.events: dict[str, int] = defaultdict(int)  # agent -> settled
        self.behind: dict[str, int] = {}  # agent -> not settled
        self.checkpoints = 0
        self.checkpoint_ms = 0.0  # moving mean
        self.errors = 0
        self.retries = 0
        self.dead_letters = 0
        self.sent = 0

    def checkpointed(self, took_s: float, checkpoint: Checkpoint) -> None:
        """A checkpoint was committed."""
        self.checkpoints += 1
        self.sent += sum(len(output.keys) for output in checkpoint.outputs)
        self.checkpoint_ms += (took_s * 1000 - self.checkpoint_ms) / min(self.checkpoints, 20)
