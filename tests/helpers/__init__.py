"""What tests of several files use: small models, data and runs, stock models to compare with, and processes."""
