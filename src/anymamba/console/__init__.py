"""What verbs of the command line share: flags, output, signals, errors, models by name."""
