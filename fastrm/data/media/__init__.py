"""Media formats: how each model family reads images and videos.

A reference to a file comes in, with the limits of files; its tokens go out, counted from headers alone, and its patches
as bytes. Open `format.py` first, the interface; each family is one module beside it.
"""
