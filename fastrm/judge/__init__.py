"""Generative judges: what they wrote about the responses of a prompt, as verdicts and figures."""
