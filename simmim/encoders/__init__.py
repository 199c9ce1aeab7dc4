"""What turns images into feature maps.

`base` says what the rest of the toolkit may know of an encoder, `registry` names the encoders there are. An encoder is a
folder of its own, whose `FAMILY` the registry loads when it is asked for.
"""
