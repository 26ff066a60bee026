"""The `headrace` command, one module per sub-command; heavy imports wait until a command runs."""
