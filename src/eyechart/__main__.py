"""``python -m eyechart`` is the same program as ``eyechart``."""

from eyechart.cli import main

if __name__ == "__main__":
    main()
