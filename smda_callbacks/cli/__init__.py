"""The command line ``smda``: one file per command. Importing it is light: what is heavy is loaded when a command runs."""
