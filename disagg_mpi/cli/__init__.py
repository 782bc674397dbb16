"""The command line. ``main`` is the group; each command is a module."""
