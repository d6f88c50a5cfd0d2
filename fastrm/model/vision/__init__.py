"""The families of stock models that read images, one module for each.

A stock model and the patches of a pack come in; the features that take the places of its image tokens go out.
Open `tower.py` first, then `VisionFamily` in families.py of `fastrm/model`, all that the rest of fastrm knows.
"""
