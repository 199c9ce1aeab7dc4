"""Whether a run that is resumed has the images that it was started with."""

from __future__ import annotations

import pytorch_lightning as pl

from simmim.data import IndexedSamples, StreamedSamples
from simmim.data.records import digest_paths
from simmim.messages import notify


class SameImages(pl.Callback):
    """Tells when a run is resumed with other images than those that it was started with, as when a folder cannot be read.

    Args:
        count: images of an epoch.
        samples: of them.
    """

    def __init__(self, count: int, samples: IndexedSamples | StreamedSamples) -> None:
        self.count = count
        digests = [digest_paths(source) for source in samples.sources] if isinstance(samples, IndexedSamples) else []
        known = [digest for digest in digests if digest is not None]
        self.digest = " ".join(known) if known and len(known) == len(digests) else None

    def state_dict(self) -> dict:
        """What the images are known by."""
        return {"count": self.count, "digest": self.digest}

    def load_state_dict(self, state: dict) -> None:
        """Compare with the images of the checkpoint."""
        if state["count"] != self.count:
            difference = f"{state['count']:,} then, {self.count:,} now"
        elif None not in (state["digest"], self.digest) and state["digest"] != self.digest:
            difference = f"{self.count:,} then and now, with other names"
        else:
            return
        notify(
            f"this run goes on with other images than before: {difference}. It is no longer what the uninterrupted run "
            "would have been; if that is not intended, stop it, and resume it once all images are there again"
        )
