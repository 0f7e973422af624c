"""The loops, one visible file per method. Knows no other stage.

For users `zhibei.train` is also the function that trains: see the end of zhibei/__init__.py.
"""
