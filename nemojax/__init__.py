"""nemojax: a parent model goes in, a smaller and faster reasoning model comes out."""

__version__ = "0.1.0"
