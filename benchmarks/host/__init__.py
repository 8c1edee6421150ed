"""How fast the exported graphs run on a computer: see __main__.py."""
