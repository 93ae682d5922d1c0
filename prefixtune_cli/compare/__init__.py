"""`ptp compare`: methods compared fairly, on the same rows, with the same number of steps, each at its best rate.

A comparison is made in one of three ways, and is a `comparison.Comparison` in each of them:

    run             methods are trained: contest (who takes part; grids has what was typed), rows, stages (workers and
                    cells do the work), collect, and then the costs
    runs            finished runs are read: finished_run, fairness
    costs           costs alone are measured, in speed/
    rates           no comparison: `ptp train --find-learning-rate`

The rest tells what was found, and needs no torch:

    metrics         what is measured, with units and digits
    standing        who is better, and whether by more than noise
    wording         the words that the legend and the verdict share
    table, legend   what the command prints; `report` makes a page of it
    axes, pictures, plots
"""
