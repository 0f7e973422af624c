"""`python -m zhibei` is the command `zhibei`."""

from zhibei.cli.app import main

if __name__ == "__main__":
    main()
