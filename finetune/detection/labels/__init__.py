"""Images with boxes, from the files that labeling tools write: one reader a format, in `registry.READERS`.

A reader gives what a file says (`base.RawScene`); `scenes.py` turns it into upright boxes, classes and parts.
"""
