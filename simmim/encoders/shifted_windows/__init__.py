"""What both versions of the Swin Transformer share: windows, their shift, stages, and how a map travels through them.

No encoder family: `simmim.encoders.swin` and `simmim.encoders.swinv2` are.
"""
