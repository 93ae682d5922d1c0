"""`ptp merge-info`: what an adapter is, what it costs and what it has learned, before it is deployed or merged.

base            the base without its weights
saved_adapter   an adapter on the disk, and whether it is damaged
matrices        its trained matrices: norms, spectra, effective ranks
costs           what it costs for each token, and whether it can be folded into the base
one_adapter     all of this of one adapter
pairs           every two of several adapters: whether they can be merged, and how alike they are
bias            the bias that an adapter adds to attention or an FFN, summed up while a model runs
bias_on_data    `--data`: the biases of adapters on real rows, which needs the base's weights
plots           all pictures
"""
