"""``python -m curvscope``: the same as the command ``curvscope``."""

from .cli import main

if __name__ == "__main__":
    main()
