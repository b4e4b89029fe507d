"""The command line: one file a verb. Only here are device, dtype, threads, paths and seeds chosen."""

from anymamba.cli.app import main as main
