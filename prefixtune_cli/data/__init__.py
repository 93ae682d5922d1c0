"""Data: files in, checked rows, tokens with labels, statistics out. Nothing here knows a model or a trainer.

locate, folders         where the data is: a file, a folder, a sample or a hub data set
read                    the rows of a file by its type: lines, json_rows, csv_rows, stored
columns, format         which format the columns have, and its conversion to a common layout
message, field          checked messages and texts
load                    rows of one source, checked and written to disk
conversation, template  a row as messages, and as the text that a chat template makes of them
row_encoder             a row as token ids and labels
tokenized_data          a whole data set as tokens, with its statistics
inspect                 what `ptp inspect-data` shows
question                prompts without answers, for `ptp generate`
benchmark, mmlu, table  a benchmark's data from local files
"""
