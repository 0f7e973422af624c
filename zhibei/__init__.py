"""zhibei (指北): from data to a model that speaks, with the known pits caught before they cost a run."""

__version__ = "0.1.0"
