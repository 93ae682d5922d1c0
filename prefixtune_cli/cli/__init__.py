"""The command line: every file here talks to the user and calls one function below."""
