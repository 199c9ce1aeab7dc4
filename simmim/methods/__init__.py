"""How an encoder learns without labels.

`base` is the protocol, `registry` names the methods there are; each method is a file.
"""
