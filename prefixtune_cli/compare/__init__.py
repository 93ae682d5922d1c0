"""`ptp compare`: methods against each other, fairly: same rows, same steps, each at its best learning rate.

`comparison` holds what was found; reading finished runs, the statistics, the table and the report need no torch.
"""
