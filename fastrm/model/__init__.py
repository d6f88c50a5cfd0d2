"""The reward model: stock transformers modules run over packs, a head, and everything that loads and exports them.

A pack comes in; rewards (R,) go out, with a loss if one is asked for. `RewardNetwork` runs the stock model's own
modules in an order of its own, so that a prompt is computed once; `exactness.py` compares the result with the stock
class. Open `network.py` first, then `backbone.py` for the forward pass, `families.py` for which models there are,
`loading.py` and `export.py` for files.
"""
