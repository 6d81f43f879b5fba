"""The command line: `dno`."""
