"""Sharing of a trained model: `fastrm push`, which sends it to the hub with a card that says what it is.

A run's folder comes in; a repository of the hub goes out. Open `push.py` for what is sent, `card.py` for what is said.
"""
