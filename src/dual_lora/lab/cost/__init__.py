"""Knowing before running: memory by phase, arithmetic and time of a training step, without weights or a device.

options       what is to be trained, from a recipe or a model and options
simulate      one training step of the empty model (`lab/model/empty`); deep models by two shallow ones
activations   which bytes are held at every moment of a step
workspace     what an operator uses inside itself
flops         arithmetic of the operators that torch does not count
memory        the step's memory by phase, on one device; sharding the same on many
calibrate     the model of time, and how fast this machine is
fits          the largest batch, length or rank for a given memory
side_by_side  several methods beside each other
"""
