"""Prepared sets: what training reads, made from the sources once.

    read      rows of the sources -> units of checked records with hashes of their contents     units.py
    select    copies, matches with benchmarks, groups of one prompt, held-out, caps, repeats    select.py
    count     groups -> tokens and media, or why they cannot be trained on                      count.py
    index     arrays that training maps, and decodes records by                             stored.py

The sources of a configuration come in; a folder goes out that training maps into memory, with a report of what was
kept, refused, merged and removed. Reading and counting go on in worker processes and where a killed preparation has
stopped; selecting works on columns of numbers alone. The result depends neither on the number of workers nor on where
it was killed. Open `build.py` first, which makes a set, then `stored.py`, which is what training sees of it.
"""
