"""The command line ``smda``: one file per command. Heavy libraries are loaded when a command runs."""
