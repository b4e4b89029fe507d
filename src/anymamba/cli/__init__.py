"""The command line, one file per verb. Only this folder chooses device, dtype, threads, paths and seeds."""

from anymamba.cli.app import main as main
