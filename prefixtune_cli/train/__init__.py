"""Training: a recipe goes in, a run directory comes out.

run              `train`, from top to bottom
checks           refusals before the base loads; plain words for a full memory or disk, and for lost processes
start            the trained adapter that the run goes on from
prepare          the run's data
judge            the scores of base, start and adapter
fit              the training itself, from the newest whole checkpoint
trainer          transformers' Trainer made safe: checkpoints, stops, losses that are no numbers
sft, preference  the trainers of the objectives, and a recipe in TRL's terms
basis, prefix    how Prefix-Tuning+ and Prefix-Tuning begin
trial            one step of the longest batch before the first
order            the order of the rows, for any number of processes
callbacks        the journal, and the watches over the loss and the weights
stop             the signals that end a run
fused_head       TRL's fused loss, fitted to a CPU
environment, loss_plot, summary  the files of a run
"""

from prefixtune_cli.train.run import train
from prefixtune_cli.train.summary import Summary

__all__ = ["Summary", "train"]
