"""Knowing before running: memory by phase, arithmetic and time of a training step, without weights or a device.

setting    what is to be trained, from a recipe or a model and options
empty      the model with its method, as tensors without data
live       which bytes live at every moment of a step
simulate   one training step of the empty model; deep models by two shallow ones
workspace  what an operator uses inside itself
flops      arithmetic of the operators that torch does not count
memory     the step's memory by phase, on one device
sharding   the same on many devices
calibrate  how fast this machine trains
fits       the largest batch, length or rank for a given memory
"""
