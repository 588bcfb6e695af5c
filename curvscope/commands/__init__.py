"""The commands of the command line, one file each; :mod:`curvscope.cli` puts them together.

Each module has ``add(app)``, which registers its command with a typer application. They import
typer, so only the command line imports them.
"""
