"""Media: the readers of images, videos and archives, and how each model family takes what they read.

A reference to a file comes in, with the limits of files; its tokens go out, counted from headers alone, and its patches
as bytes. Open `format.py` first, the interface of a family; each family is one module beside it.
"""
