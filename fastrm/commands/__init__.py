"""The commands of `fastrm`: functions whose parameters are the options, and whose docstrings are the help texts.

The options of a command line come in; a call of the package that does the work goes out, imported inside the function
so that --help is instant. Open `training.py` first; the module `fastrm.cli` gives the commands their names.
"""
