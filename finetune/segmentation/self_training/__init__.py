"""Segmentation with unlabeled images: `simmim.finetune.self_training`, with a label for each pixel.

The teacher sees a crop, the student the same crop in other colors, into which a box of another unlabeled image is pasted
with its pseudo-labels (CutMix: French et al., arXiv 1906.01916; UniMatch, 2208.09910).
"""
