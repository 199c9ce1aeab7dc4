"""Encoders: networks that turn images into feature maps.

`base` is the protocol that the rest of the toolkit uses. `registry` maps names to encoder families. Each family is a folder
with a `FAMILY`, which the registry imports on first use.
"""
