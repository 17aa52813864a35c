"""One module a command; `flame.cli` loads it when the command is called."""
