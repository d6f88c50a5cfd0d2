"""The tests: a folder for each package of fastrm, for bench/, for the project as a whole, and for what joins the
kernels to others, whose own tests are in kernels/tests.

What several of them use is in tests.helpers. This file makes `tests` a package of this folder's: distributions that
bring a package of that name are met in the wild, and processes that tests start would import theirs.
"""
