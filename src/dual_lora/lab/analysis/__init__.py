"""Measures of the change that fine-tuning makes to weights: signs, zeros, ranks, gradients, likeness to full
fine-tuning.

matrices      an update [O, I] that is read a block at a time
updates       the updates of an adapted model, of any PEFT method, or of a fully fine-tuned one
measures      zeros, signs, norms of one update; flips between two
ranks         effective, stable and numerical rank, and what ReLU and Sign may do to a rank
likeness      cosine, sign agreement and subspace angles of two updates; DoRA's magnitude and direction
gradients     one gradient pass: entries that the clip cuts, share of each group, the first step
contribution  the loss with one group set back or drawn anew
trajectory    a run's states from its start to its end
opened_run    a run as it stood before its first step
walk          one run's layers, one after another
callback      the same measures while a Trainer runs
analyze       all of it for run folders, as tables, JSON and a page
"""
