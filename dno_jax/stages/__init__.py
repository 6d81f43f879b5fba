"""The stages of an iteration; every effect of the program lives here.

`stages.<name>.run(config, iteration) -> Manifest`.
"""
