"""The tests: a folder for each package of fastrm, for its kernels, for bench/, and for the project as a whole.

What several of them use is in tests.helpers. This file makes `tests` a package of this folder's: distributions that
bring a package of that name are met in the wild, and processes that tests start would import theirs.
"""
