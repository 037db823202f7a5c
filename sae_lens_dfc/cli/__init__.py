"""The command line: each command's name, and the options and function it starts."""
