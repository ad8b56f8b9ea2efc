"""The command line: one file per command, which parses, calls fnlm and prints."""
