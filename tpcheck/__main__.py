"""`python -m tpcheck`, the same as the console command."""

from tpcheck.cli import main

if __name__ == "__main__":
    main()
