"""Whether a pre-training was worth it, in plain words."""

from __future__ import annotations

from collections.abc import Mapping

LEAST_GAIN = 0.01  # in accuracy; less counts as no better
FEW_IMAGES = 10_000  # with fewer, weights that exist are worth a try


def verdict(accuracy: float, others: Mapping[str, float], num_images: int | None = None) -> str:
    """Whether features are worth having, in plain words, and what to try where they are not.

    Args:
        accuracy: of the features, in [0, 1].
        others: accuracy by name of what they are compared with, "plain pixels" for instance.
        num_images: of the pre-training, where known.
    """
    unbeaten = [name for name, other in others.items() if accuracy - other < LEAST_GAIN]
    if not unbeaten:
        return f"Pre-training has helped: the features are better than {' and '.join(others)}."
    least = min(others[name] for name in unbeaten)
    if least > 1 - LEAST_GAIN and accuracy > least - LEAST_GAIN:  # as good as what nothing could be better than
        return (
            f"These images do not tell whether pre-training has helped: accuracy is {least:.1%} already by "
            f"{' and '.join(unbeaten)}. Compare on harder ones, or with fewer labels."
        )
    few = num_images is not None and num_images < FEW_IMAGES
    return (
        f"Pre-training has not helped yet: the features are not a point better than {' and '.join(unbeaten)}. Try more "
        "epochs, a higher learning rate (--optim.lr) or a smaller encoder (--preset). "
        + (f"{num_images:,} images are few: beginning" if few else "Beginning")
        + " from weights that exist (--init) may be better."
    )
