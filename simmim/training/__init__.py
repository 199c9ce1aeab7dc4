"""What both stages put around Lightning: trainer, data module, progress line, metrics file, checkpoints.

Training is one loop over steps: batches come from one endless stream (`simmim.data.EndlessBatchSampler`), an epoch is a
number of samples, and a run resumes at any step by taking the stream from there.
"""
