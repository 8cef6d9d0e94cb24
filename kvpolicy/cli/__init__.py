"""The command `kvpolicy`: one file a command."""
