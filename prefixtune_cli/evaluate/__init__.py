"""How good a base and its adapters are: on held-out rows, on your own data, and on lm-eval's benchmarks.

Each figure of an adapter is compared with the base's figure on the same items. Import the modules by name: a
training run needs only `held_out`, and only a benchmark imports lm-eval.

run, settings               `ptp eval`, from top to bottom, and its settings
evaluations, subjects       what is asked, and who answers: a base and adapters on it
held_out                    the held-out rows of a training run
likelihoods, preferences, labelled    what models make of pairs and of labelled answers, and the figures of it
read_data, own_data         the user's test data: rows with one answer
own_pairs, own_labelled     the user's test data: pairs of answers, labelled answers
forgetting                  text that has nothing to do with the task
benchmarks, catalogue, tasks, language_model    lm-eval's benchmarks
questions, matching, labels, confusion_plot     rows as questions, right answers, classes
scorer, batches, shared_prefix, answer_cache    how losses and answers are computed, batched and kept
losses, paired, outcome     the comparison of models, with intervals by the bootstrap, and what is written
"""
