"""`python -m cli`: the same as `fnlm`."""

from cli.main import main

main()
