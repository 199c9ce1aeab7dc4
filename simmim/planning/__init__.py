"""What a pre-training run needs before it is started: parameters, FLOPs, memory, and the options that make it fit.

`step` adds up one training step from what encoder and method state, `plan` searches for the options, `growing` for those
that fit every size of a run whose images grow, `report` is the table.
"""
