"""Reports that people read in a browser, one HTML file each, which asks nothing of a network.

Sections of texts, tables, charts and rows of data come in; a page goes out, in the form of `page.html`, `page.css` and
`page.js`. It stands below `data`, so that every package can write reports. Open `page.py` first.
"""
