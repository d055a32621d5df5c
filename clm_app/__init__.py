"""What the app knows: data, strategies, judging, versions and serving; no widget, no route, no scheduler."""

__version__ = "0.1.0"
