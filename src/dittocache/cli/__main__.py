"""`python -m dittocache.cli`, for launchers such as accelerate's."""

from . import main

if __name__ == "__main__":
    main()
