"""`python -m agent.cli`: the same as the console script."""

from agent.cli.app import main

if __name__ == "__main__":
    main()
