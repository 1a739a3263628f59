"""Knowing before running: memory by phase, arithmetic and time of a training step, without weights or a device.

options       what is to be trained, from a recipe or a model and options
simulate      one training step of the empty model (`lab/model/empty`); deep models by two shallow ones
operators     which bytes are held at every moment of a step; what operators compute and use inside themselves
memory        the step's memory by phase, on one device or many
calibrate     the model of time, and how fast this machine is
side_by_side  several methods side by side; the largest batch, length or rank for a given memory
"""
